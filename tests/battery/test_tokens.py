import os
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bizzaroworld.battery.audit import audit
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import NOTES, REASONS, AlignmentError, TokenPair, align, continuation, encode, token_span, token_table

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PERU = PromptPair("The capital of Peru is", "The capital of Chile is", " Lima", " Santiago", "Peru", "Chile",
                  id="peru", category="capitals", relation="capital")


def wrap(tok, **options):
    return PreTrainedTokenizerFast(tokenizer_object=tok, **{"bos_token": "<s>", "unk_token": "<unk>", **options})


def word_pieces(words, lower=False, **options):
    """Known words are one token, other words are cut into letters; offsets leave the space out."""
    known = dict.fromkeys(["<s>", "<unk>", *words, *LETTERS, *(f"##{c}" for c in LETTERS)])
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower: tok.normalizer = normalizers.Lowercase()
    return wrap(tok, **options)


TOY = word_pieces("The capital of is Peru Cuba Chile Bo ##livia Lima Santiago Hav ##ana old in new So".split())
CORPUS = ["aba cab abc bca the cat of ba", "abba the caba of cab cc abc", "bab of the cat bac"] * 3


def byte_level():
    """GPT-2's kind: a space belongs to the token after it."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=285, special_tokens=["<s>"], show_progress=False,
                                                        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return wrap(tok)


def sentence_piece():
    """Llama's kind: a dummy space in front of every text."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>", "<unk>"], show_progress=False, initial_alphabet=list("abcdefgh")))
    return wrap(tok)


def across_words():
    """Spaces are ordinary characters, so that a token may hold the end of one word and the beginning of the next."""
    vocab = {t: i for i, t in enumerate(["<s>", "<unk>", "▁", *"abcdefgh", "a▁", "a▁b", "▁g", "▁h"])}
    tok = Tokenizer(models.BPE(vocab, [("a", "▁"), ("a▁", "b"), ("▁", "g"), ("▁", "h")], unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return wrap(tok)


KINDS = {"byte_level": byte_level(), "sentence_piece": sentence_piece(), "across_words": across_words()}
TARGETS = {"byte_level": (" the", " cab"), "sentence_piece": (" the", " cab"), "across_words": (" g", " h")}


def why(tok, pair) -> AlignmentError:
    with pytest.raises(AlignmentError) as e:
        align(tok, pair)
    assert set(e.value.reasons) <= set(REASONS)
    return e.value


def test_what_align_promises():
    tp = align(TOY, PERU)
    names = TOY.convert_ids_to_tokens
    assert names(list(tp.clean_ids)) == ["<s>", "The", "capital", "of", "Peru", "is"]
    assert names(list(tp.corrupt_ids)) == ["<s>", "The", "capital", "of", "Chile", "is"]
    assert (names(tp.clean_target_id), names(tp.corrupt_target_id)) == ("Lima", "Santiago")
    assert (tp.id, tp.entity_span, tp.entity, tp.final, tp.differing, tp.warnings) == ("peru", (4, 5), 4, 5, (4,), ())
    with pytest.raises(FrozenInstanceError):
        tp.entity_span = (0, 1)


def test_entities_of_several_tokens():
    pair = replace(PERU, clean_prompt="The Bolivia is", corrupt_prompt="The Havana is", clean_entity="Bolivia", corrupt_entity="Havana")
    tp = align(TOY, pair)
    assert (tp.entity_span, tp.entity, tp.final, tp.differing) == ((2, 4), 3, 4, (2, 3))


def test_accepts_a_model_with_a_tokenizer():
    class Model:
        tokenizer = TOY
    assert align(Model(), PERU) == align(TOY, PERU)


def test_slow_tokenizers_are_refused_with_a_remedy():
    class Slow:
        is_fast = False
    e = why(Slow(), PERU)
    assert e.reason == "no_offsets" and "use_fast=True" in str(e)
    with pytest.raises(AlignmentError):
        audit({"slow": Slow()}, [PERU])


def test_one_bos_and_never_two():
    bos = TOY.bos_token_id
    assert encode(TOY, "The capital").ids.count(bos) == 1 and encode(TOY, "The capital").ids[0] == bos
    adds_its_own = word_pieces(["The"])
    adds_its_own._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <unk>", special_tokens=[("<s>", 0), ("<unk>", 1)])
    assert adds_its_own("The")["input_ids"] == [0, 2, 1]
    assert encode(adds_its_own, "The").ids == (0, 2)
    assert encode(TOY, "<s>The").ids == encode(TOY, "The").ids
    assert encode(word_pieces(["The"], bos_token=None), "The").ids == (2,)


def test_no_bos_moves_every_position():
    with_bos, without = align(TOY, PERU), align(word_pieces("The capital of is Peru Chile Lima Santiago".split(), bos_token=None), PERU)
    assert (without.entity, without.final) == (with_bos.entity - 1, with_bos.final - 1)


REFUSED = [
    (dict(corrupt_prompt="The capital of Bolivia is", corrupt_entity="Bolivia"), ("length_differs",), ["6 and 7", "'Bo' '##livia'"]),
    (dict(clean_target=" Havana"), ("clean_target_not_one_token",), ["' Havana' is 2 tokens", "'Hav' '##ana'"]),
    (dict(corrupt_target=" Havana"), ("corrupt_target_not_one_token",), ["' Havana' is 2 tokens"]),
    (dict(clean_target=" Havana", corrupt_target=" Bolivia"), ("clean_target_not_one_token", "corrupt_target_not_one_token"), ["Havana", "Bolivia"]),
    (dict(clean_target=" Kōbe"), ("unknown_token",), ["clean_target ' Kōbe'"]),
    (dict(corrupt_prompt="The capital, of Chile is"), ("unknown_token",), ["corrupt_prompt"]),
    (dict(clean_entity="Per"), ("entity_not_found",), ["'Per'", "whole words"]),
    (dict(clean_prompt="The Bolivia capital is", corrupt_prompt="The Peru Havana is", clean_entity="Bolivia", corrupt_entity="Peru"),
     ("entity_length_differs",), ["'Bolivia' has 2", "'Peru' has 1"]),
    (dict(clean_prompt="The old Peru is", corrupt_prompt="The Chile old is"), ("entity_moved",), ["'Peru' begins at position 3", "'Chile' at 2"]),
]


@pytest.mark.parametrize("change, reasons, said", REFUSED)
def test_refusals(change, reasons, said):
    e = why(TOY, replace(PERU, **change))
    assert e.reasons == reasons and e.reason == reasons[0] and e.pair_id == "peru"
    assert str(e) == f"peru: {e.message}"
    for text in said:
        assert text in e.message


def test_same_target():
    lower = word_pieces("the capital of is peru chile lima santiago".split(), lower=True)
    assert align(lower, PERU).warnings == ()
    assert why(lower, replace(PERU, corrupt_target=" LIMA")).reasons == ("same_target",)


def test_differences_elsewhere_are_warnings():
    tp = align(TOY, replace(PERU, clean_prompt="The old Peru is", corrupt_prompt="The new Chile of"))
    assert tp.differing == (2, 3, 4) and tp.warnings == ("differs_outside_entity", "differs_at_final")
    assert align(TOY, replace(PERU, clean_prompt="old Peru is", corrupt_prompt="new Chile is")).warnings == ("differs_outside_entity",)
    assert align(TOY, replace(PERU, clean_prompt="of Peru", corrupt_prompt="of Chile")).warnings == ("differs_at_final",)


def test_the_entity_that_differs_is_found_not_the_first_of_its_name():
    pair = replace(PERU, clean_prompt="So Peru in Peru is", corrupt_prompt="So Peru in Chile is")
    assert align(TOY, pair).entity == 4


def test_tokens_that_hold_more_than_the_entity():
    tok = KINDS["across_words"]  # "a b" becomes one token: the end of one word and the beginning of the next
    cut = replace(PERU, clean_prompt="ha bcd ef", corrupt_prompt="ha ccd ef", clean_entity="bcd", corrupt_entity="ccd", clean_target=" g", corrupt_target=" h")
    assert "entity_cuts_token" in why(tok, cut).reasons
    assert token_span(encode(tok, "ha bcd"), (3, 6)) == ((2, 5), False)
    assert token_span(encode(tok, "ha bcd"), (0, 2)) == ((1, 3), False)
    assert token_span(encode(tok, "hc bcd"), (3, 6)) == ((4, 7), True)
    with pytest.raises(ValueError, match="no token"):
        token_span(encode(tok, "ha bcd"), (6, 8))


def test_targets_are_what_follows_the_prompt():
    llama = KINDS["sentence_piece"]
    alone, prompt = llama(" the", add_special_tokens=False)["input_ids"], encode(llama, "cab of")
    assert len(alone) > 1 and len(continuation(llama, prompt, " the")) == 1
    tok = KINDS["across_words"]
    assert continuation(tok, encode(tok, "ca"), " c") is None
    merged = replace(PERU, clean_prompt="ecfa", corrupt_prompt="edfa", clean_entity="ecfa", corrupt_entity="edfa", clean_target=" b", corrupt_target=" d")
    assert why(tok, merged).reasons[0] == "target_depends_on_prompt"


def test_a_target_must_be_the_same_token_on_both_runs():
    vocab = {t: i for i, t in enumerate(["<s>", "<unk>", "▁", "c", "d", "e", "g", "h", "▁g", "g▁", "▁h", "d▁"])}
    tok = Tokenizer(models.BPE(vocab, [("d", "▁"), ("▁", "g"), ("▁", "h")], unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    pair = replace(PERU, clean_prompt="e", corrupt_prompt="d", clean_entity="e", corrupt_entity="d", clean_target=" g", corrupt_target=" h")
    e = why(wrap(tok), pair)
    assert e.reasons == ("target_depends_on_prompt",) * 2 and "same whole word" in e.message


def test_token_table():
    table = token_table(TOY, align(TOY, PERU))
    assert list(table.place) == ["", "", "", "", "entity", "final"] and list(table.corrupt)[4] == "Chile"


WORD = st.text("abcdefgh", min_size=1, max_size=4)
SIDES = st.lists(WORD, max_size=3)
ENTITIES = st.lists(st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.text("abcdefgh", min_size=n, max_size=n)] * 2)), min_size=1, max_size=2)


def check_promises(tok, pair, tp):
    start, stop = tp.entity_span
    assert len(tp.clean_ids) == len(tp.corrupt_ids) and tp.entity == stop - 1 <= tp.final
    for ids, prompt, entity, target, tid in ((tp.clean_ids, pair.clean_prompt, pair.clean_entity, pair.clean_target, tp.clean_target_id),
                                             (tp.corrupt_ids, pair.corrupt_prompt, pair.corrupt_entity, pair.corrupt_target, tp.corrupt_target_id)):
        assert ids[0] == tok.bos_token_id and tok.bos_token_id not in ids[1:]
        assert tok.decode(ids[1:]) == prompt
        offsets = encode(tok, prompt).offsets[start:stop]
        assert prompt[offsets[0][0]:offsets[-1][1]].strip() == entity
        assert tuple(tok(prompt + target, add_special_tokens=False)["input_ids"]) == ids[1:] + (tid,)
    if not tp.warnings: assert tp.clean_ids[:start] + tp.clean_ids[stop:] == tp.corrupt_ids[:start] + tp.corrupt_ids[stop:]


@pytest.mark.parametrize("kind", KINDS)
def test_aligned_pairs_keep_their_promises(kind):
    """Whatever the words: an aligned pair's span is exactly its entity, a refusal is true, and both happen."""
    tok, (target, other_target), seen = KINDS[kind], TARGETS[kind], Counter()

    @settings(max_examples=200, deadline=None)
    @given(before=SIDES, entities=ENTITIES, after=st.lists(WORD, min_size=1, max_size=3))
    def check(before, entities, after):
        one, other = (" ".join(side) for side in zip(*entities))
        assume(one != other)
        clean, corrupt = (" ".join([*before, e, *after]) for e in (one, other))
        pair = replace(PERU, clean_prompt=clean, corrupt_prompt=corrupt, clean_entity=one, corrupt_entity=other,
                       clean_target=target, corrupt_target=other_target)
        lengths = [len(encode(tok, p).ids) for p in (clean, corrupt)]
        try: tp = align(tok, pair)
        except AlignmentError as e:
            seen["refused"] += 1
            assert ("length_differs" in e.reasons) == (lengths[0] != lengths[1])
        else:
            seen["aligned"] += 1
            assert lengths == [len(tp.clean_ids)] * 2
            check_promises(tok, pair, tp)

    check()
    assert seen["aligned"] > 20 and seen["refused"] > 5, seen


@settings(max_examples=100, deadline=None)
@given(before=st.lists(WORD, max_size=3), one=WORD, letters=st.permutations("abcdefgh"), after=st.lists(WORD, min_size=1, max_size=3))
def test_equal_tokenization_is_always_aligned(before, one, letters, after):
    """With one token per letter, any two entities of the same shape line up and differ nowhere else."""
    tok = word_pieces([])
    other = one.translate(str.maketrans("abcdefgh", "".join(letters)))
    assume(one != other and one not in before + after and other not in before + after)
    clean, corrupt = (" ".join([*before, e, *after]) for e in (one, other))
    tp = align(tok, replace(PERU, clean_prompt=clean, corrupt_prompt=corrupt, clean_entity=one, corrupt_entity=other, clean_target=" a", corrupt_target=" b"))
    start = 1 + sum(map(len, before))
    assert tp.entity_span == (start, start + len(one)) and tp.warnings == ()
    assert set(tp.differing) <= set(range(*tp.entity_span))


# --- spaces, BOS, answers of several tokens

def gpt2_like(*wanted):
    """Bytes, and the tokens asked for: `Ġ` stands for a space. Its BOS is its unknown token, as GPT-2's is."""
    vocab, merges = {t: i for i, t in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []
    for token in wanted:
        for i in range(len(token) - 1 if token[1:] in vocab else 1, len(token)):  # a space before a token that is there, or letter by letter
            a, b = (token[0], token[1:]) if token[1:] in vocab else (token[:i], token[i])
            if a + b not in vocab:
                merges.append((a, b))
                vocab[a + b] = len(vocab)
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrap(tok, bos_token="<|endoftext|>", unk_token="<|endoftext|>", eos_token="<|endoftext|>")


SPACED = gpt2_like("Paris", "ĠParis", "Rome", "ĠRome", "ĠPeru", "ĠCuba", "Ġlikes", "Ġred", "Ġblue", "17", "52", "61", "Ġ52", "Ġ61", "ĠNew")


def likes(clean="So Peru likes", corrupt="So Cuba likes", a=" red", b=" blue", **options):
    tp = align(SPACED, PromptPair(clean, corrupt, a, b), **options)
    assert set(tp.notes) <= set(NOTES) and tp.warnings[:len(tp.notes)] == tp.notes
    names = SPACED.convert_ids_to_tokens([tp.clean_target_id, tp.corrupt_target_id])
    return (tp.pair.clean_prompt, tp.pair.clean_target, tp.pair.corrupt_target), names, tp.notes


SPACES = [
    (("So Peru likes", "So Cuba likes", " red", " blue"), ("So Peru likes", " red", " blue"), ["Ġred", "Ġblue"], ()),
    (("So Peru likes", "So Cuba likes", "red", "blue"), ("So Peru likes", " red", " blue"), ["Ġred", "Ġblue"], ("target_space_added",)),
    (("So Peru likes", "So Cuba likes", "Paris", " Rome"), ("So Peru likes", " Paris", " Rome"), ["ĠParis", "ĠRome"], ("target_space_added",)),
    (("So Peru likes ", "So Cuba likes ", " red", " blue"), ("So Peru likes", " red", " blue"), ["Ġred", "Ġblue"], ("prompt_space_removed",)),
    (("So Peru likes ", "So Cuba likes", "red", " blue"), ("So Peru likes", " red", " blue"), ["Ġred", "Ġblue"],
     ("prompt_space_removed", "target_space_added")),
    (("So Peru likes", "So Cuba likes", "  red ", " blue"), ("So Peru likes", " red", " blue"), ["Ġred", "Ġblue"], ("target_space_removed",)),
    (("So Peru likes\n", "So Cuba likes\n", "Paris", "Rome"), ("So Peru likes\n", "Paris", "Rome"), ["Paris", "Rome"], ()),
    (("So Peru likes\n", "So Cuba likes\n", " Paris", " Rome"), ("So Peru likes\n", " Paris", " Rome"), ["ĠParis", "ĠRome"], ("target_space_doubtful",)),
    (("So Peru 17", "So Cuba 17", "52", "61"), ("So Peru 17", "52", "61"), ["52", "61"], ("target_space_doubtful",)),
    (("So Peru 17", "So Cuba 17", " 52", " 61"), ("So Peru 17", " 52", " 61"), ["Ġ52", "Ġ61"], ()),
    (("So Peru:", "So Cuba:", "red", "blue"), ("So Peru:", " red", " blue"), ["Ġred", "Ġblue"], ("target_space_added",)),
]


@pytest.mark.parametrize("typed, kept, names, notes", SPACES)
def test_the_tokenizer_decides_about_spaces(typed, kept, names, notes):
    assert likes(*typed) == (kept, names, notes)


def test_what_was_typed_can_be_insisted_on():
    assert likes(a="Paris", b="Rome", mend=False) == (("So Peru likes", "Paris", "Rome"), ["Paris", "Rome"], ())
    with pytest.raises(AlignmentError, match="'red' is 3 tokens"): likes(a="red", b="blue", mend=False)


def test_a_space_that_makes_no_difference_is_not_spoken_of():
    tp = align(TOY, replace(PERU, clean_target="Lima", clean_prompt="The capital of Peru is ", corrupt_prompt="The capital of Chile is "))
    assert tp.notes == () and tp.pair.clean_target == "Lima" and (tp.clean_ids, tp.clean_target_id) == (align(TOY, PERU).clean_ids, align(TOY, PERU).clean_target_id)


def test_a_refusal_speaks_of_the_pair_as_one_writes_it():
    e = why(SPACED, PromptPair("So Peru likes ", "So Cuba likes ", "green", "Rome"))
    assert e.reasons == ("clean_target_not_one_token",) and "' green' is" in e.message and "multi_token" in e.message


def test_what_was_mended_is_in_the_tables():
    pairs = [PromptPair("So Peru likes", "So Cuba likes", a, b) for a, b in [("red", "blue"), (" blue", " red"), (" New x", " New y"), ("Rome", "Paris")]]
    a = audit({"t": SPACED}, pairs, multi_token=True)
    assert a.table.warnings.tolist() == ["target_space_added", "", "target_shared_prefix", "target_space_added"]
    assert a.summary().notes[0] == "target_space_added 2, target_shared_prefix 1"
    assert audit({"t": SPACED}, pairs).summary().reasons[0] == "clean_target_not_one_token 1"
    assert audit({"t": SPACED}, pairs, mend=False, bos=False).summary()[["usable", "notes"]].values.tolist() == [[2, ""]]
    assert a.table.pair_id.tolist() == [p.id for p in pairs]


def test_a_typed_bos_is_a_bos():
    bare, typed = (align(SPACED, PromptPair(f"{head}So Peru likes", f"{head}So Cuba likes", " red", " blue")) for head in ("", "<|endoftext|>"))
    assert typed.clean_ids == bare.clean_ids and typed.clean_ids.count(0) == 1 and typed.entity_span == bare.entity_span
    e = why(word_pieces("So Peru Cuba likes red blue".split()), PromptPair("<unk>So Peru likes", "<unk>So Cuba likes", " red", " blue"))
    assert e.reason == "unknown_token"


def test_a_switch_for_the_bos():
    pair = PromptPair("So Peru likes", "So Cuba likes", " red", " blue")
    with_bos, without = align(SPACED, pair, bos=True), align(SPACED, pair, bos=False)
    assert with_bos == align(SPACED, pair) and without.clean_ids == with_bos.clean_ids[1:] and without.entity == with_bos.entity - 1
    assert encode(SPACED, "<|endoftext|>So", bos=False).ids[0] == 0, "what is typed stays"
    with pytest.raises(AlignmentError, match="no BOS") as e: align(word_pieces(["So"], bos_token=None), pair, bos=True)
    assert e.value.reason == "no_bos" in REASONS


def test_answers_of_several_tokens_are_compared_where_they_part():
    def got(a, b):
        tp = align(SPACED, PromptPair("So Peru likes", "So Cuba likes", a, b), multi_token=True)
        text = SPACED.decode(tp.clean_ids[1:])
        assert tp.pair.clean_prompt == text and encode(SPACED, text).ids == tp.clean_ids and tp.final == len(tp.clean_ids) - 1
        return text, SPACED.convert_ids_to_tokens([tp.clean_target_id, tp.corrupt_target_id]), tp.pair.clean_target, tp.notes
    assert got(" red", " blue") == ("So Peru likes", ["Ġred", "Ġblue"], " red", ())
    assert got(" redx", " blue") == ("So Peru likes", ["Ġred", "Ġblue"], " redx", ("target_first_token",))
    assert got(" Newx", " Newy") == ("So Peru likes New", ["x", "y"], "x", ("target_shared_prefix",))
    assert got(" 1752", " 1761") == ("So Peru likes 17", ["52", "61"], "52", ("target_shared_prefix",)) or SPACED.tokenize(" 1752")
    assert got(" Newxyz", " Newxz") == ("So Peru likes Newx", ["y", "z"], "yz", ("target_shared_prefix", "target_first_token"))


def test_an_answer_that_the_other_goes_on_from_tells_nothing():
    for a, b, reason in [(" New", " Newx", "target_is_prefix"), (" Newx", " New", "target_is_prefix"), (" Newx", " Newx", "same_target")]:
        with pytest.raises(AlignmentError) as e: align(SPACED, PromptPair("So Peru likes", "So Cuba likes", a, b), multi_token=True)
        assert e.value.reasons == (reason,)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_keep_the_promises(kind):
    """Whatever the answers: appending what they share, and taking the next token, is how each answer follows its prompt."""
    tok, seen = KINDS[kind], Counter()

    @settings(max_examples=150, deadline=None)
    @given(st.text("abcdefgh", min_size=1, max_size=5), st.text("abcdefgh", min_size=1, max_size=5))
    def check(a, b):
        pair = PromptPair("bac cab ed", "bac abc ed", f" {a}", f" {b}")
        try: tp = align(tok, pair, multi_token=True)
        except AlignmentError as e:
            seen["refused"] += 1
            assert not e.reason.endswith("not_one_token")
            if e.reason == "same_target": assert a == b
            return
        seen[tp.notes] += 1
        for prompt, target, ids, tid in ((pair.clean_prompt, pair.clean_target, tp.clean_ids, tp.clean_target_id),
                                         (pair.corrupt_prompt, pair.corrupt_target, tp.corrupt_ids, tp.corrupt_target_id)):
            assert encode(tok, prompt + target).ids[:len(ids) + 1] == (*ids, tid)
            assert len(ids) - len(encode(tok, prompt).ids) >= ("target_shared_prefix" in tp.notes)
        assert tp.clean_target_id != tp.corrupt_target_id and len(tp.clean_ids) == len(tp.corrupt_ids)
        if not tp.notes: assert tp == align(tok, pair)

    check()
    noted = {note for notes in seen if notes != "refused" for note in notes}
    assert noted >= {"target_first_token", "target_shared_prefix"} and seen["refused"], seen


# --- audit

def pair(name, entity, category="capitals", relation="capital", target=" Santiago"):
    return replace(PERU, id=name, category=category, relation=relation, corrupt_prompt=f"The capital of {entity} is", corrupt_entity=entity, corrupt_target=target)


GOOD, LONG, CUT = pair("good", "Cuba"), pair("long", "Bolivia"), pair("cut", "Cuba", target=" Havana")


def test_audit_takes_one_tokenizer_or_model_as_triage_does():
    several = audit({"toy": TOY}, [GOOD, LONG, CUT])
    for given, name in ((TOY, "tokenizer"), (SimpleNamespace(tokenizer=TOY, name="here"), "here"), (SimpleNamespace(tokenizer=TOY, name="a/here"), "here")):
        a = audit(given, [GOOD, LONG, CUT])
        assert list(a.entries) == [name] == list(a.summary().tokenizer)
        assert a.usable() == a.usable(name) == several.usable("toy") and a.selection() == several.selection()
        pd.testing.assert_frame_equal(a.dropped(), several.dropped("toy"))
    for found, asked in ((several, "other"), (audit({"a": TOY, "b": TOY}, [GOOD]), None)):
        for method in (found.usable, found.selection, found.dropped):
            with pytest.raises(ValueError, match=f"no tokenizer {asked!r} was audited; name one of '(toy|a', 'b)'"): method(asked)


def test_audit_counts_and_reasons():
    a = audit({"toy": TOY}, [GOOD, LONG, CUT])
    assert [t.id for t in a.usable("toy")] == [t.id for t in a.selection("toy")] == ["good"]
    assert all(isinstance(t, TokenPair) for t in a.usable("toy"))
    d = a.dropped("toy")
    assert list(d.columns) == ["pair_id", "battery_idx", "reason", "message", "replaced_by"]
    assert d.values.tolist() == [["long", 1, "length_differs", why(TOY, LONG).message, "none"],
                                 ["cut", 2, "corrupt_target_not_one_token", why(TOY, CUT).message, "none"]]
    s = a.summary().iloc[0]
    assert (s.pairs, s.usable, s.dropped, s.replaced, s.selected, s.spares_usable) == (3, 1, 2, 0, 1, 0)
    assert s.reasons == "length_differs 1, corrupt_target_not_one_token 1"


def test_spares_take_the_place_of_dropped_pairs():
    spares = [pair("unusable", "Bolivia"), pair("elsewhere", "Cuba", category="rivers"), pair("same-category", "Chile", relation="seat"), pair("same-relation", "Cuba")]
    a = audit({"toy": TOY}, [LONG, GOOD], spares)
    assert [t.id for t in a.selection("toy")] == ["same-relation", "good"]
    a = audit({"toy": TOY}, [LONG, GOOD, CUT, replace(LONG, id="third")], spares)
    assert list(a.dropped("toy").replaced_by) == ["same-relation", "same-category", "none"]
    assert [t.id for t in a.selection("toy")] == ["same-relation", "good", "same-category"]
    assert a.summary().iloc[0][["usable", "dropped", "replaced", "selected", "spares_usable"]].tolist() == [1, 3, 2, 3, 3]


def test_a_spare_goes_first_to_the_pair_of_its_own_relation():
    seat = replace(LONG, id="seat", relation="seat")
    a = audit({"toy": TOY}, [seat, LONG], [pair("s1", "Cuba"), pair("s2", "Chile", relation="seat")])
    assert list(a.dropped("toy").replaced_by) == ["s2", "s1"]


def test_drift_between_tokenizers():
    other = word_pieces("The capital of is Peru Cuba Bolivia Lima Santiago Hav ##ana".split())
    a = audit({"toy": TOY, "other": other}, [GOOD, LONG, CUT])
    assert list(a.drift.index) == ["long"] and list(a.drift.columns) == ["toy", "other"]
    assert a.drift.loc["long"].tolist() == ["length_differs", "usable"]
    assert list(a.table.columns) == ["tokenizer", "battery_idx", "pair_id", "category", "usable", "reason", "message", "replaced_by", "warnings"]
    assert len(a.table) == 6 and a.table.usable.sum() == 3
    assert audit({"toy": TOY}, [GOOD, LONG]).drift.empty


def test_audit_refuses_ids_that_collide():
    with pytest.raises(ValueError, match="good.*id of its own"):
        audit({"toy": TOY}, [GOOD, LONG], [GOOD])


# --- real tokenizers, where they are

ROOT = Path(__file__).resolve().parents[2]


def real(name):
    folder = Path(os.environ.get("BIZZARO_TOKENIZERS", ROOT.parent / "shared" / "tokenizers")) / name
    if not folder.is_dir(): pytest.skip(f"no tokenizer {name} (set BIZZARO_TOKENIZERS to a folder that holds it)")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gemma-1", "gemma-3"])
def test_every_shipped_pair_is_usable_under_gemma(name):
    a = audit({name: real(name)}, load_battery(), load_spares())
    assert a.dropped(name).empty and len(a.usable(name)) == 60
    assert a.summary().spares_usable[0] >= 58
    assert all(t.warnings == () and t.clean_ids[0] == 2 for t in a.usable(name))


@pytest.mark.parametrize("name, bos, newton", [("gemma-1", 2, True), ("gemma-3", 2, False), ("gpt2", 50256, False), ("pythia", 0, False)])
def test_real_tokenizers(name, bos, newton):
    tok = real(name)
    tp = align(tok, replace(PERU, corrupt_prompt="The capital of Spain is", corrupt_entity="Spain", clean_target=" Paris", corrupt_target=" Madrid"))
    assert tp.clean_ids[0] == bos and tp.clean_ids.count(bos) == 1
    assert tok.decode([tp.clean_ids[tp.entity]]).strip() == "Peru" and tok.decode([tp.corrupt_ids[tp.entity]]).strip() == "Spain"
    unit = replace(PERU, clean_prompt="The unit of force is the", corrupt_prompt="The unit of power is the", clean_entity="force",
                   corrupt_entity="power", clean_target=" newton", corrupt_target=" watt")
    assert (name, newton) == (name, _aligns(tok, unit))


def _aligns(tok, p):
    try: return bool(align(tok, p))
    except AlignmentError as e:
        assert e.reason == "clean_target_not_one_token"
        return False


@pytest.mark.parametrize("name", ["gemma-1", "gemma-3", "gpt2", "pythia"])
def test_a_forgotten_space_is_mended_under_every_real_tokenizer(name):
    tok = real(name)
    right = align(tok, PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome"))
    for space, a, b in [("", "Paris", "Rome"), (" ", "Paris", "Rome"), (" ", " Paris", " Rome")]:
        tp = align(tok, PromptPair(f"The capital of France is{space}", f"The capital of Italy is{space}", a, b))
        assert replace(tp, pair=right.pair, notes=()) == right and tp.notes and tp.pair.clean_target == " Paris"
    line = align(tok, PromptPair("Where is France?\n", "Where is Italy?\n", "Paris", "London"))
    assert line.notes == () and line.clean_target_id != right.clean_target_id


def test_scripts_without_spaces_under_gemma():
    for pair in (PromptPair("法国的首都是", "英国的首都是", "巴黎", "伦敦"), PromptPair("イタリアの首都は", "フランスの首都は", "ローマ", "パリ")):
        tp = align(real("gemma-3"), pair)
        assert tp.notes == () and (tp.entity_span, tp.pair) == ((1, 2), pair)
    assert why(real("gemma-3"), PromptPair("日本の首都は", "中国の首都は", "東京", "北京")).reasons == ("length_differs",)


def test_years_under_real_tokenizers():
    pair = PromptPair("The war lasted from the year 1732 to the year 17", "The war lasted from the year 1745 to the year 17", "52", "61")
    tp = align(real("gpt2"), pair)
    assert tp.pair == pair and real("gpt2").convert_ids_to_tokens([tp.clean_target_id, tp.corrupt_target_id]) == ["52", "61"]
    tok = real("gemma-3")
    assert why(tok, replace(pair, corrupt_target="58")).reason == "clean_target_not_one_token"
    tp = align(tok, replace(pair, corrupt_target="58"), multi_token=True)
    assert tok.convert_ids_to_tokens([tp.clean_ids[-1], tp.clean_target_id, tp.corrupt_target_id]) == ["5", "2", "8"]
    assert tp.notes == ("target_space_doubtful", "target_shared_prefix") and tp.pair.clean_prompt.endswith("to the year 175")


def test_the_original_studys_battery():
    """Its file is not part of this project: name a copy of it to run this."""
    file = os.environ.get("BIZZARO_ORIGINAL_BATTERY")
    if not file: pytest.skip("set BIZZARO_ORIGINAL_BATTERY to a copy of the original study's fact_battery.json")
    a = audit({n: real(n) for n in ("gemma-1", "gemma-3", "gpt2")}, load_battery(file))
    assert list(a.summary().usable) == [60, 57, 38]
    assert Counter(a.dropped("gemma-3").reason) == {"clean_target_not_one_token": 1, "corrupt_target_not_one_token": 1, "length_differs": 1}
    assert sum(bool(t.warnings) for t in a.usable("gemma-1")) == 15
    assert sum("differs_at_final" in t.warnings for t in a.usable("gemma-1")) == 1
