"""From a template to an aligned pair; the drawing of pairs."""
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bizzaroworld.battery.tokens import REASONS, AlignmentError, encode
from bizzaroworld.tasks.drafts import Draft, aligned, filled
from bizzaroworld.tasks.recipes import collect, single_tokens, turned

NAMES = ["Ada", "Bea", "Cy", "Dee"]
WORDS = ["<s>", "<unk>", "So", "and", "met", "gave", "to", ".", ",", *NAMES, "Long", "##ly", "1", "7", "##7", "##3", "##2", "17", "32", "##32", "##37"]


def tokenizer(words=WORDS):
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>")


TOK = tokenizer()
PLACES = {"IO": "IO", "S1": "S1", "S1+1": "S1+1", "S2": "S2"}


def draft(template="So {IO} and {S1} met . {S2} gave to", io="Ada", s="Bea", entity=("S2",), places=None, **change):
    clean = {"IO": io, "S1": s, "S2": s}
    return Draft("toy", "plain", template, clean, clean | (change or {"S2": io}), (f" {io}", f" {s}"), entity, places or PLACES)


@given(st.lists(st.tuples(st.text("xyz .{}", max_size=5), st.text("abc ", min_size=1, max_size=5)), min_size=1, max_size=5))
def test_slots_know_their_characters(parts):
    template = "".join(before.replace("{", "{{").replace("}", "}}") + f"{{s{i}}}" for i, (before, _) in enumerate(parts))
    values = {f"s{i}": value for i, (_, value) in enumerate(parts)}
    text, spans = filled(template, values | {"unused": "?"})
    assert text == "".join(before + value for before, value in parts)
    assert {slot: text[a:b] for slot, (a, b) in spans.items()} == values


def test_a_slot_twice_is_refused():
    with pytest.raises(ValueError, match="'S' is twice"): filled("{S} and {S}", {"S": "Ada"})


def test_places_and_answers_of_an_aligned_draft():
    tp = aligned(TOK, draft())
    assert dict(tp.places) == {"IO": (2,), "S1": (4,), "S1+1": (5,), "S2": (7,)}
    words = TOK.convert_ids_to_tokens
    assert [words(tp.clean_ids[i]) for _, (i,) in tp.places] == ["Ada", "Bea", "met", "Bea"]
    assert [words(tp.corrupt_ids[i]) for _, (i,) in tp.places] == ["Ada", "Bea", "met", "Ada"]
    assert tp.differing == (7,) == tuple(range(*tp.entity_span)) and tp.warnings == ()
    assert tp.answers == ((WORDS.index("Ada"),), (WORDS.index("Bea"),))
    assert (tp.pair.category, tp.pair.relation) == ("toy", "plain")


def test_two_stretches_may_differ_and_both_are_named():
    tp = aligned(TOK, draft(entity=("S1",), IO="Cy", S1="Dee"))
    assert tp.differing == (2, 4) and tp.entity == 4 and "differs_outside_entity" in tp.warnings


def test_the_entity_is_the_slot_and_not_the_first_word_that_reads_so():
    assert aligned(TOK, draft()).entity_span == (7, 8)


@pytest.mark.parametrize("change, reason", [
    (dict(S2="Longly"), "length_differs"),                        # two tokens for one
    (dict(S1="Longly", S2="Ada", io="Longly", IO="Ada"), "clean_target_not_one_token"),
    (dict(S2="Nobody"), "unknown_token"),
])
def test_refusals_are_those_of_align(change, reason):
    with pytest.raises(AlignmentError) as e: aligned(TOK, draft(**change))
    assert reason in e.value.reasons and set(e.value.reasons) <= set(REASONS)


def test_slots_that_move_against_each_other_are_refused():
    """As many tokens in all, but the second slot stands elsewhere: `align` alone would take it."""
    with pytest.raises(AlignmentError) as e: aligned(TOK, draft("{IO} {S1} met {S2} gave to", io="Longly", s="Ada", S1="Longly", IO="Ada",
                                                                entity=("S2",)))
    assert e.value.reason in ("entity_moved", "clean_target_not_one_token")
    moved = Draft("toy", "plain", "So {a} {b} met", {"a": "Longly", "b": "Ada"}, {"a": "Ada", "b": "Longly"}, (" Cy", " Dee"), ("a", "b"), {"a": "a"})
    with pytest.raises(AlignmentError) as e: aligned(TOK, moved)
    assert e.value.reason == "entity_moved"


def test_a_slot_inside_a_token_is_refused():
    whole = Draft("toy", "plain", "So {head}{year} to", {"head": "17", "year": "32"}, {"head": "17", "year": "7"}, (" Ada", " Bea"), ("head", "year"), {"YY": "year"})
    assert TOK.tokenize("1732") == ["17", "##32"]
    assert dict(aligned(TOK, whole).places) == {"YY": (3,)}
    cut = Draft("toy", "plain", "So {head}{year} to", {"head": "173", "year": "2"}, {"head": "173", "year": "7"}, (" Ada", " Bea"), ("head", "year"), {"Y": "year"})
    with pytest.raises(AlignmentError) as e: aligned(TOK, cut)
    assert e.value.reason == "entity_cuts_token"


def test_sets_of_answers_are_single_tokens_or_refused():
    one = draft()
    sets = Draft(**{**vars(one), "answers": ((" Ada", " Cy"), (" Bea",))})
    tp = aligned(TOK, sets)
    assert tp.answers == ((WORDS.index("Ada"), WORDS.index("Cy")), (WORDS.index("Bea"),))
    with pytest.raises(AlignmentError) as e: aligned(TOK, Draft(**{**vars(one), "answers": ((" Ada",), (" Bea", " Longly"))}))
    assert e.value.reason == "corrupt_target_not_one_token" and "Longly" in str(e.value)


def cell(wording, names=NAMES):
    def draw(rng: Random):
        io, s = rng.sample(names, 2)
        return Draft(**{**vars(draft(io=io, s=s)), "wording": wording, "template": f"{wording} {{IO}} and {{S1}} met . {{S2}} gave to"})
    return draw


def test_cells_take_turns_and_no_prompt_comes_twice():
    pairs = collect(TOK, [cell("So"), cell("met")], 23, "s")
    assert [tp.pair.relation for tp in pairs] == (["So", "met"] * 12)[:23]
    assert len({tp.clean_ids for tp in pairs}) == 23
    assert collect(TOK, [cell("So"), cell("met")], 23, "s") == pairs != collect(TOK, [cell("So"), cell("met")], 23, "t")
    assert {tp.clean_ids for tp in pairs} & {tp.corrupt_ids for tp in pairs} == set()


def test_all_that_there_are_and_no_more():
    assert len(collect(TOK, [cell("So")], 12, "s")) == 12  # 4 names, ordered
    with pytest.raises(ValueError, match="12 distinct pairs.* Ask for n=12"): collect(TOK, [cell("So")], 13, "s")


def test_a_cell_with_fewer_pairs_stops_or_is_passed_over():
    cells = [cell("So", NAMES[:2]), cell("met"), cell("gave", ["Longly", "Ada"])]  # 2 pairs, 12, and none that this tokenizer aligns
    with pytest.raises(ValueError, match="4 distinct pairs in even shares"): collect(TOK, cells, 14, "s")
    pairs = collect(TOK, cells, 14, "s", even=False)
    assert [tp.pair.relation for tp in pairs].count("met") == 12
    with pytest.raises(ValueError, match="14 distinct pairs, not 15"): collect(TOK, cells, 15, "s", even=False)


def test_apart_keeps_both_sides_from_coming_twice():
    def draw(rng):
        a, b = rng.sample(NAMES, 2)
        return Draft("toy", "w", "So {e} met", {"e": a}, {"e": b}, (" gave", " to"), ("e",), {"e": "e"})
    pairs = collect(TOK, [draw], 2, "s", apart=True)
    assert len({ids for tp in pairs for ids in (tp.clean_ids, tp.corrupt_ids)}) == 4
    with pytest.raises(ValueError, match="2 distinct pairs"): collect(TOK, [draw], 3, "s", apart=True)


def test_a_tokenizer_that_cannot_write_it_says_why():
    with pytest.raises(ValueError, match="cannot write the task.*does not know a word"): collect(tokenizer(WORDS[:8]), [cell("So")], 3, "s")


def test_single_tokens_are_known_and_counted():
    assert single_tokens(TOK, [*NAMES, "Longly", "Nobody"], before="So") == NAMES
    with pytest.raises(ValueError, match="4 of 6 names as single tokens, and the task needs 5"):
        single_tokens(TOK, [*NAMES, "Longly", "Nobody"], before="So", least=5, what="names")


def test_turning_twice_gives_the_pair():
    one = collect(TOK, [cell("So")], 1, "s")[0]
    other = turned(TOK, one)
    assert (other.clean_ids, other.corrupt_ids, other.clean_target_id, other.places) == (one.corrupt_ids, one.clean_ids, one.corrupt_target_id, one.places)
    assert other.id != one.id and turned(TOK, other) == one
    assert encode(TOK, other.pair.clean_prompt).ids == other.clean_ids
