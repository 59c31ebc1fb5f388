import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from bizzaroworld.battery.audit import one_by_one
from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.battery.triage import STUDY_COLUMNS, TriageError, baselines, kind_ranks, kinds, read_targets, triage

NAMES = ["Ada", "Bea", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal"]
ANSWERS = ["red", "blue", "green", "gold", "pink", "gray", "teal", "rust"]
WORDS = ["<s>", "<unk>", "So", "of", "likes", *NAMES, *ANSWERS, "Two", "##part"]


def tokenizer():
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>")


TOK = tokenizer()
ID = {w: i for i, w in enumerate(WORDS)}


class Table:
    """A stand-in whose logits are looked up by the name in the prompt: `{name: {token: logit}}`, others 0."""
    tokenizer, device, d_vocab = TOK, torch.device("cpu"), len(WORDS)

    def __init__(self, logits, dtype=torch.float32):
        self.answers, self.dtype, self.batches = logits, dtype, []

    def logits(self, ids):
        assert ids.dtype == torch.long
        self.batches.append(tuple(ids.shape))
        out = torch.zeros(len(ids), len(WORDS), dtype=self.dtype)
        for row, seq in zip(out, ids.tolist()):
            name = next(WORDS[i] for i in seq if WORDS[i] in self.answers)
            for token, value in self.answers[name].items(): row[ID[token]] = value
        return out


def pair(i, category="c", words=1, relation="likes", **change):
    """Pair number i: two names and the answer of each; `words` of filler make its prompts longer."""
    a, b = NAMES[2 * i], NAMES[2 * i + 1]
    start = "So " * words
    return replace(PromptPair(f"{start}{a} likes", f"{start}{b} likes", f" {ANSWERS[2 * i]}", f" {ANSWERS[2 * i + 1]}", a, b,
                              f"p{i}", category, relation), **change)


PAIRS = [pair(0, "x"), pair(1, "y", words=2), pair(2, "x"), pair(3, "z")]
LOGITS = {"Ada": {"red": 3.0, "blue": 1.0}, "Bea": {"red": -1.0, "blue": 4.0},         # swing 2 + 5 = 7, known
          "Cy": {"green": 1.0, "gold": 0.5, "So": 2.0}, "Dee": {"green": 0.0, "gold": 1.0},  # 0.5 + 1 = 1.5, clean side not first
          "Eve": {"pink": 6.0, "gray": 1.0}, "Flo": {"pink": 5.0, "gray": 3.0},         # 5 - 2 = 3, corrupted side wrong
          "Gus": {"teal": 5.0}, "Hal": {"rust": 4.0}}                                   # 5 + 4 = 9, known


def test_read_targets_against_softmax():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 11), torch.tensor([[0, 1], [2, 3], [10, 4], [5, 5], [7, 0]])
    got, p = read_targets(logits, targets), logits.softmax(-1)
    for r, (a, b) in enumerate(targets.tolist()):
        assert got["ld"][r].item() == pytest.approx((logits[r, a] - logits[r, b]).item())
        assert got["p"][r].tolist() == pytest.approx([p[r, a].item(), p[r, b].item()], rel=1e-5)
        order = logits[r].argsort(descending=True).tolist()
        assert got["rank"][r].tolist() == [order.index(a) + 1, order.index(b) + 1]


def test_read_targets_is_done_in_32_bits():
    logits = torch.tensor([[300.0, 299.0, 0.0]], dtype=torch.float16)
    got = read_targets(logits, torch.tensor([[0, 1]]))
    assert got["ld"].dtype == torch.float32 and got["p"][0].sum().item() == pytest.approx(1, abs=1e-6)


def test_the_numbers_and_the_order():
    t = triage(Table(LOGITS), PAIRS).table
    assert tuple(t.columns[:14]) == STUDY_COLUMNS
    assert list(t["rank"]) == [1, 2, 3, 4] and list(t.battery_idx) == [3, 0, 2, 1]
    assert t.total_swing.tolist() == pytest.approx([9, 7, 3, 1.5])
    row = t.set_index("pair_id").loc["p0"]
    assert (row.ld_clean, row.ld_corrupt) == (2, -5)
    rest = len(WORDS) - 2
    assert row.p_clean_target_on_clean == pytest.approx(math.e**3 / (math.e**3 + math.e + rest), rel=1e-5)
    assert row.p_corrupt_target_on_corrupt == pytest.approx(math.e**4 / (math.e**4 + 1 / math.e + rest), rel=1e-5)
    assert (row.clean_target_id, row.corrupt_target_id) == (ID["red"], ID["blue"])
    assert (row.clean_prompt, row.corrupt_target, row.clean_entity, row.corrupt_entity) == ("So Ada likes", " blue", "Ada", "Bea")


def test_the_columns_of_the_study_are_exactly_these():
    assert ", ".join(STUDY_COLUMNS) == (
        "rank, battery_idx, total_swing, ld_clean, ld_corrupt, p_clean_target_on_clean, p_corrupt_target_on_corrupt, category, "
        "clean_prompt, corrupt_prompt, clean_target, corrupt_target, clean_target_id, corrupt_target_id")


def test_what_the_model_knows():
    t = triage(Table(LOGITS), PAIRS)
    k = t.table.set_index("pair_id")
    assert k.known.to_dict() == {"p3": True, "p0": True, "p2": False, "p1": False}
    assert k.loc["p1", ["sign_ok", "top1", "knows_clean", "knows_corrupt", "clean_target_rank"]].tolist() == [True, False, False, True, 2]
    assert k.loc["p2", ["sign_ok", "top1", "knows_clean", "knows_corrupt", "corrupt_target_rank"]].tolist() == [False, False, True, False, 2]
    assert list(t.outside().pair_id) == ["p2", "p1"] and list(t.outside("preferred").pair_id) == ["p2"]
    assert k.preferred.to_dict() == k.sign_ok.to_dict() and k.first_of_all.to_dict() == k.known.to_dict()
    s = t.summary().set_index("mode")
    assert s.columns.tolist() == ["pairs", "preferred", "first_of_kind", "first_of_all", "verdicts", "mean_total_swing"]
    assert s.loc["C"].tolist()[:5] == [4, 3, 3, 2, 2] and s.loc["B"].tolist()[:5] == [3, 3, 3, 2, 2]
    assert t.line == ("The model prefers the right answer on 3 of 4 pairs, ranks it first among its kind on 3, first of all on 2; "
                      "2 have both answers preferred and a TotalSwing of 2 logits or more.")
    assert s.loc["C", "mean_total_swing"] == pytest.approx(20.5 / 4)


def test_another_answer_of_the_same_relation_ranks_a_pair_down_and_one_of_another_relation_does_not():
    louder = {**LOGITS, "Ada": {"red": 3.0, "blue": 1.0, "teal": 4.0}}  # the answer of p3
    for relation, first in (("likes", False), ("hates", True)):
        t = triage(Table(louder), [*PAIRS[:3], replace(PAIRS[3], relation=relation)]).table.set_index("pair_id")
        assert t.loc["p0", ["preferred", "first_of_kind", "first_of_all", "of_kind"]].tolist() == [True, first, False, 8 if relation == "likes" else 6]
    alone = triage(Table(louder), PAIRS[:1]).table.iloc[0]
    assert alone.of_kind == 2 and alone.first_of_kind and not alone.first_of_all


def test_ranks_among_a_kind_against_a_sort():
    torch.manual_seed(0)
    for _ in range(20):
        logits, kind = torch.randn(30), torch.randperm(30)[:7].tolist()
        order = sorted(kind, key=lambda i: -logits[i])
        assert kind_ranks(logits, torch.tensor(kind[:2]), kind).tolist() == [order.index(i) + 1 for i in kind[:2]]


def test_kinds_are_the_answers_of_a_relation():
    tps = triage(Table(LOGITS), [*PAIRS[:2], replace(PAIRS[2], relation="hates")]).token_pairs
    assert kinds(tps) == {"likes": sorted(map(ID.get, ANSWERS[:4])), "hates": sorted(map(ID.get, ANSWERS[4:6]))}


@pytest.mark.parametrize("seed", range(8))
def test_the_three_sets_are_nested_whatever_the_logits(seed):
    random = torch.Generator().manual_seed(seed)
    noise = {name: dict(zip(WORDS, (torch.randint(0, 3, (len(WORDS),), generator=random) + 0.0).tolist())) for name in NAMES}  # with many ties
    t = triage(Table(noise), [replace(p, relation=f"r{i % 2}") for i, p in enumerate(PAIRS)]).table
    assert not (t.first_of_all & ~t.first_of_kind).any() and not (t.first_of_kind & ~t.preferred).any()


def test_a_tie_is_not_knowledge():
    t = triage(Table({**LOGITS, "Ada": {"red": 3.0, "blue": 3.0}}), PAIRS[:1]).table.iloc[0]
    assert t.clean_target_rank == 1 and not t.knows_clean and not t.sign_ok and t.top1 and not t.known


def test_one_pair_has_and_two_have():
    assert "; 1 has both answers" in triage(Table(LOGITS), PAIRS[:1]).line and "; 2 have both answers" in triage(Table(LOGITS), PAIRS).line


def test_golden_pairs():
    t = triage(Table(LOGITS), PAIRS)
    def ids(mode, **options): return [tp.id for tp in t.golden(mode, **options)]
    assert all(isinstance(tp, TokenPair) for tp in t.golden("C"))
    assert ids("A") == ids("C") == ["p3", "p0", "p2", "p1"]
    assert ids("B") == ["p3", "p0", "p1"]
    assert ids("B", known="first_of_all") == ids("C", known="first_of_all") == ["p3", "p0"]
    assert ids("C", known="preferred") == ["p3", "p0", "p1"] and ids("C", known="preferred", min_swing=2) == ["p3", "p0"]
    with pytest.raises(ValueError, match="'D'.*top 15"):
        t.golden("D")


def test_golden_pairs_can_be_chosen_among_the_known():
    lost = {**LOGITS, "Ada": {"red": 30.0}, "Bea": {"blue": 1.0, "So": 2.0}}   # the best of x is now unknown
    swapped = {**lost, "Flo": {"gray": 3.0}}                                   # and the second best known
    t = triage(Table(swapped), PAIRS)
    assert [tp.id for tp in t.golden("B")] == ["p0", "p3", "p1"]
    assert [tp.id for tp in t.golden("B", known="first_of_all")] == ["p3", "p2"]


def many(n):
    """n pairs over the same names, told apart by the number of filler words."""
    return [replace(pair(i % 4, f"c{i % 3}", words=1 + i % 5), id=f"m{i}") for i in range(n)]


def test_mode_a_is_the_top_fifteen():
    t = triage(Table(LOGITS), many(22))
    assert [tp.id for tp in t.golden("A")] == list(t.table.pair_id[:15]) and len(t.golden("C")) == 22


def test_equal_swings_keep_the_batterys_order():
    t = triage(Table(LOGITS), many(200)).table
    assert t[t.clean_entity == "Gus"].battery_idx.tolist() == list(range(3, 200, 4))
    assert t.total_swing.is_monotonic_decreasing and t["rank"].tolist() == list(range(1, 201))


def test_token_pairs_follow_the_table():
    t = triage(Table(LOGITS), many(22))
    for tp, row in zip(t.token_pairs, t.table.itertuples()):
        assert (tp.id, tp.pair.clean_prompt, tp.clean_target_id) == (row.pair_id, row.clean_prompt, row.clean_target_id)


def test_batches_hold_equal_lengths_and_no_more_than_asked():
    model = Table(LOGITS)
    triage(model, many(22), batch_size=4)
    assert max(rows for rows, _ in model.batches) <= 4 and sum(rows for rows, _ in model.batches) == 44
    with pytest.raises(ValueError, match="batch_size"):
        triage(model, PAIRS, batch_size=0)


CUT = pair(1, "x", id="cut", corrupt_target=" Twopart")


def test_dropped_pairs_are_replaced_in_their_place():
    spare = pair(3, "x", id="spare")
    t = triage(Table(LOGITS), [PAIRS[0], CUT, replace(CUT, id="cut2")], [spare])
    assert t.excluded.columns.tolist() == ["pair_id", "battery_idx", "reason", "message", "replaced_by"]
    assert t.excluded[["pair_id", "battery_idx", "reason", "replaced_by"]].values.tolist() == [
        ["cut", 1, "corrupt_target_not_one_token", "spare"], ["cut2", 2, "corrupt_target_not_one_token", "none"]]
    row = t.table.set_index("pair_id").loc["spare"]
    assert (row.battery_idx, row.replaces, row.clean_prompt) == (1, "cut", "So Gus likes")
    assert t.table.replaces.tolist() == ["cut", ""] and len(t.golden("C")) == 2


def test_no_usable_pair_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="none of 1 pairs.*Twopart.*2 tokens"):
        triage(Table(LOGITS), [CUT])
    with pytest.raises(ValueError, match="none of 0 pairs"):
        triage(Table(LOGITS), [])


def test_a_pair_whose_logits_are_not_finite_is_excluded_and_the_others_are_ranked():
    t = triage(Table({**LOGITS, "Flo": {"So": float("nan")}}), PAIRS)
    whole = triage(Table(LOGITS), PAIRS)
    assert t.excluded[["pair_id", "reason", "replaced_by"]].values.tolist() == [["p2", "not_finite", "none"]] and "dtype='float32'" in t.excluded.message[0]
    kept = whole.table[whole.table.pair_id != "p2"]
    assert t.table.drop(columns="rank").equals(kept.drop(columns="rank").reset_index(drop=True)) and t.table["rank"].tolist() == list(range(1, len(kept) + 1))
    assert [tp.id for tp in t.golden("C")] == kept.pair_id.tolist()


def test_where_no_pair_is_finite_it_is_said_what_to_do():
    with pytest.raises(TriageError, match="none of .* can be used with this model; .*not finite; load it with dtype='float32'"):
        triage(Table({name: {"So": float("inf")} for name in LOGITS}), PAIRS)


def test_prompts_that_are_too_long_for_positions_or_memory_are_excluded_before_they_run():
    """Those that fit are ranked as if the others were not there; where none fits the first is told of."""
    lengths = {tp.id: len(tp.clean_ids) for tp in triage(Table(LOGITS), PAIRS).token_pairs}
    assert set(lengths.values()) == {4, 5}
    class Short(Table): free_bytes, shape, positions = 10**9, SimpleNamespace(row_values=lambda tail, length: 10**3 * length), 4
    class Small(Short): positions, free_bytes = None, 4 * 10**3 * 4
    for kind, why in ((Short, "it has 5 tokens, and the model has positions for 4"), (Small, "it has 5 tokens, whose attention takes about")):
        t = triage(kind(LOGITS), PAIRS)
        assert set(t.excluded.pair_id) == {i for i, n in lengths.items() if n == 5} and set(t.table.pair_id) == {i for i, n in lengths.items() if n == 4}
        assert set(t.excluded.reason) == {"too_long"} and t.excluded.message.str.startswith(why).all()
    Short.positions = 3
    with pytest.raises(TriageError, match="this model; .*positions for 3"): triage(Short(LOGITS), PAIRS)


def test_warnings_are_in_the_table():
    t = triage(Table(LOGITS), [PAIRS[0], pair(3, corrupt_prompt="of Hal likes")]).table.set_index("pair_id")
    assert t.warnings.to_dict() == {"p3": "differs_outside_entity", "p0": ""}


def test_saved_files(tmp_path):
    t = triage(Table(LOGITS), [*PAIRS, CUT])
    folder = t.save(tmp_path / "new" / "run")
    assert sorted(os.listdir(folder)) == ["excluded.csv", "golden_A.csv", "golden_B.csv", "golden_C.csv", "triage.csv"]
    back = pd.read_csv(folder / "triage.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(back, t.table, check_exact=True)
    assert list(pd.read_csv(folder / "golden_B.csv").pair_id) == [tp.id for tp in t.golden("B")]
    assert list(pd.read_csv(folder / "excluded.csv").reason) == ["corrupt_target_not_one_token"]
    before = (folder / "triage.csv").read_bytes()
    assert b"\r" not in before and t.save(folder) == folder and (folder / "triage.csv").read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    t = triage(Table(LOGITS), PAIRS)
    t.save(tmp_path)
    old = (tmp_path / "triage.csv").read_bytes()
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        t.save(tmp_path)
    assert (tmp_path / "triage.csv").read_bytes() == old
    assert not [f for f in os.listdir(tmp_path) if "tmp" in f]


class Real:
    """A random Gemma behind the interface that triage uses."""
    tokenizer, device, d_vocab = TOK, torch.device("cpu"), len(WORDS)

    def __init__(self):
        torch.manual_seed(0)
        self.hf = GemmaForCausalLM(GemmaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                               num_key_value_heads=1, head_dim=8, initializer_range=0.5)).eval()

    def logits(self, ids): return self.hf(ids).logits[:, -1].float()


def test_results_do_not_depend_on_the_batch():
    model, pairs = Real(), many(22)
    alone = triage(model, pairs, batch_size=1)
    for other in (triage(model, pairs, batch_size=5), triage(model, pairs, batch_size=64)):
        assert list(other.table.pair_id) == list(alone.table.pair_id)
        pd.testing.assert_frame_equal(other.table, alone.table, check_exact=False, rtol=1e-5, atol=1e-5)
    fewer = triage(model, pairs[::2]).table.set_index("pair_id")
    whole = alone.table.set_index("pair_id").loc[fewer.index]
    assert fewer.total_swing.tolist() == pytest.approx(whole.total_swing.tolist(), abs=1e-5)


def test_it_tells_how_far_it_is_and_that_changes_nothing():
    model, pairs, told = Real(), many(6), []
    pd.testing.assert_frame_equal(triage(model, pairs, advance=lambda *how: told.append(how)).table, triage(model, pairs).table)
    assert told[:6] == [(i, 6, "tokens") for i in range(6)] and told[6:] and [done for done, *_ in told[6:]] == list(range(told[6][1])) and {what for *_, what in told[6:]} == {"triage"}
    told.clear()
    assert list(one_by_one(range(1234), lambda *how: told.append(how), "x")) == list(range(1234)) and 90 < len(told) < 110


def test_against_one_run_at_a_time():
    model, pairs = Real(), many(6)
    t = triage(model, pairs)
    for tp, row in zip(t.token_pairs, t.table.itertuples()):
        with torch.no_grad():
            clean, corrupt = (model.hf(torch.tensor([ids])).logits[0, -1] for ids in (tp.clean_ids, tp.corrupt_ids))
        a, b = tp.clean_target_id, tp.corrupt_target_id
        assert row.ld_clean == pytest.approx((clean[a] - clean[b]).item(), abs=1e-5)
        assert row.ld_corrupt == pytest.approx((corrupt[a] - corrupt[b]).item(), abs=1e-5)
        assert row.p_corrupt_target_on_corrupt == pytest.approx(corrupt.softmax(-1)[b].item(), abs=1e-6)
        assert row.clean_target_rank == (clean > clean[a]).sum().item() + 1


def test_a_tokenizer_larger_than_the_embedding_is_told_with_the_pair():
    known = triage(Table(LOGITS), PAIRS)
    model = Table(LOGITS)
    model.d_vocab = ID["teal"]  # the last answers, teal and rust, have no row
    said = rf"p3: a token id is outside 0 to {ID['gray']}: {ID['teal']}\. Give the model its own tokenizer"
    for run in (lambda: triage(model, PAIRS), lambda: baselines(model, known.token_pairs)):
        with pytest.raises(ValueError, match=said): run()
    assert not model.batches, "it is told before anything is run"
    assert len(triage(model, PAIRS[:3]).table) == 3
    model.d_vocab = ID["rust"] + 1
    pd.testing.assert_frame_equal(triage(model, PAIRS).table, known.table)


def test_baselines_come_in_the_order_of_the_pairs():
    tps = triage(Table(LOGITS), many(9)).token_pairs
    got = baselines(Table(LOGITS), tps, batch_size=2)
    expected = [LOGITS[tp.pair.clean_entity].get(tp.pair.clean_target.strip(), 0.0) for tp in tps]
    assert [clean["logit"][0] for clean, _ in got] == expected
