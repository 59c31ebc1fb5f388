"""Whether a model can do a task: a stand-in whose answers are planted, and two real models."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bizzaroworld.battery.triage import baselines
from bizzaroworld.model.load import load_model, load_tokenizer
from bizzaroworld.tasks.ability import Ability, ability, mean_of, only_right, set_difference, share
from bizzaroworld.tasks.registry import make_task

TOK = load_tokenizer("bizzaro-nano")
VOCAB = len(TOK)


class Planted:
    """A model whose logits are looked up by the prompt: `{ids: {token: logit}}`, others 0."""
    name, tokenizer, device, d_vocab = "planted", TOK, torch.device("cpu"), VOCAB

    def __init__(self, table): self.table = table

    def logits(self, ids):
        out = torch.zeros(len(ids), VOCAB)
        for row, seq in zip(out, ids.tolist()):
            for token, value in self.table[tuple(seq)].items(): row[token] = value
        return out


def planted(task, right, first=None, corrupt_right=True):
    """Prefers the clean answer (by 2) on the first `right` prompts and the corrupted one on the others; the answer is topped by a word from number `first` on."""
    first, word, table = right if first is None else first, 5, {}
    for i, tp in enumerate(task.pairs):
        a, b = tp.clean_target_id, tp.corrupt_target_id
        assert word not in (a, b)
        table[tp.clean_ids] = {a: 3.0 if i < right else 1.0, b: 1.0 if i < right else 3.0} | ({word: 9.0} if i >= first else {})
        table[tp.corrupt_ids] = {a: 1.0, b: 3.0} if corrupt_right else table[tp.clean_ids]
    return Planted(table)


def test_the_shares_are_the_planted_ones():
    task = make_task("docstring", TOK, 20, corruption="answer")
    found = ability(planted(task, right=17, first=9), task)
    assert found.preferred.value == 17 / 20 and found.first.value == 9 / 20
    assert list(found.table.preferred) == [True] * 17 + [False] * 3 and list(found.table["first"]) == [True] * 9 + [False] * 11
    assert found.ld.value == pytest.approx((17 * 2 - 3 * 2) / 20) and found.total_swing.value == pytest.approx((17 * 4 + 3 * 0) / 20)
    assert list(found.table.pair_id) == [tp.id for tp in task.pairs] and found.can_do and "planted can do docstring (answer)" in found.sentence


def test_sets_are_compared_as_sets():
    task = make_task("greater_than", TOK, 10)
    table = {}
    for tp in task.pairs:
        for ids in (tp.clean_ids, tp.corrupt_ids): table[ids] = {i: 1.0 for i in tp.answers[0]} | {i: 2.0 for i in tp.answers[1]}
        table[tp.clean_ids] |= {tp.answers[0][-1]: 30.0}
    found = ability(Planted(table), task)
    for tp, row in zip(task.pairs, found.table.itertuples()):
        n, m = map(len, tp.answers)
        assert row.ld_corrupt == pytest.approx(math.log(n) + 1 - math.log(m) - 2, abs=1e-6)
        assert row.ld_clean == pytest.approx(math.log(math.exp(30) + (n - 1) * math.e) - math.log(m) - 2, abs=1e-5)
    assert found.first.value == 1 and found.preferred.value == 1
    assert not found.table.corrupt_preferred[found.table.ld_corrupt > 0].any()


def test_a_set_of_one_is_the_logit_difference_and_does_not_overflow():
    assert set_difference({1: 900.0, 2: -900.0}, [1], [2]) == 1800.0
    assert set_difference({1: 0.0, 2: 0.0, 3: 0.0}, [1, 2, 3], [3]) == pytest.approx(math.log(3))


@pytest.mark.parametrize("n, right, can, said", [
    (20, 15, True, "75% of 20"), (20, 14, False, "70% of 20 prompts, and 75% are asked for"), (8, 6, False, "that share may be 41%"), (8, 8, True, "100% of 8")])
def test_the_criterion(n, right, can, said):
    task = make_task("docstring", TOK, n, corruption="answer")
    found = ability(planted(task, right), task)
    assert found.can_do == can and said in found.sentence


def test_the_same_answer_whatever_the_prompt_is_no_ability():
    """It prefers the clean answer always, and the corruption changes nothing."""
    task = make_task("docstring", TOK, 20, corruption="answer")
    found = ability(planted(task, 20, corrupt_right=False), task)
    assert found.preferred.value == 1 and found.total_swing.value == 0 and not found.can_do and "does not surely lower" in found.sentence


def test_a_swing_that_may_be_none_is_no_ability():
    task = make_task("docstring", TOK, 20, corruption="answer")
    good = ability(planted(task, 20), task)
    noisy = good.table.assign(total_swing=np.where(np.arange(20) % 2, 5.0, -4.5))
    assert good.can_do and not Ability("m", "t", "c", noisy).can_do
    assert not ability(planted(task, 20), replace(task, pairs=task.pairs[:1])).can_do, "one pair tells nothing"


def test_wilson_and_bootstrap_against_formulas():
    k, n, z = 15, 20, 1.959963984540054
    p, d = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert share([True] * k + [False] * (n - k)) == pytest.approx((p, middle - half, middle + half))
    values = np.random.default_rng(1).normal(3, 1, 400)
    found, error = mean_of(values), values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean()) and found.low == pytest.approx(values.mean() - z * error, abs=0.02)
    assert mean_of(values) == found and math.isnan(mean_of(values[:1]).low) and mean_of([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_wrong_answers_are_discarded():
    task = make_task("addition", TOK, 12)
    model = planted(task, right=9, first=7)
    kept = only_right(model, task)
    assert kept.pairs == task.pairs[:7] and replace(kept, pairs=task.pairs) == task
    assert ability(model, kept).first.value == 1
    assert only_right(model, task, both=True).pairs == kept.pairs  # every corrupted answer is first here
    deaf = planted(task, right=12, corrupt_right=False)
    assert len(only_right(deaf, task)) == 12
    with pytest.raises(ValueError, match="planted ranks no answer of addition"): only_right(deaf, task, both=True)
    with pytest.raises(ValueError, match="ranks no answer"): only_right(planted(task, 0), task)


def test_a_model_with_broken_logits_is_refused():
    task = make_task("ioi", TOK, 4)
    broken = planted(task, 4)
    broken.table[task.pairs[2].corrupt_ids] = {task.pairs[2].clean_target_id: float("nan")}
    with pytest.raises(ValueError, match="not finite"): ability(broken, task)


def test_a_token_that_the_model_lacks_is_named():
    task, model = make_task("ioi", TOK, 4), Planted({})
    model.d_vocab = 10
    with pytest.raises(ValueError, match=f"{task.pairs[0].id}: a token id is outside 0 to 9"): ability(model, task)


def test_it_reads_what_triage_reads():
    """On a real model, pair by pair, as the battery's own runs."""
    model = load_model("bizzaro-nano", device="cpu")
    task = make_task("facts", model, 12)
    table = ability(model, task).table
    for row, (clean, corrupt) in zip(table.itertuples(), baselines(model, task.pairs)):
        assert (row.ld_clean, row.ld_corrupt) == pytest.approx((clean["ld"], corrupt["ld"]), abs=1e-4)
        assert (row.first, row.corrupt_first) == (clean["rank"][0] == 1, corrupt["rank"][1] == 1)


def test_the_embedded_model_knows_its_facts_and_no_ioi():
    model = load_model("bizzaro-nano", device="cpu")
    assert ability(model, make_task("paired_facts", model, 20)).first.value > 0.9
    found = ability(model, make_task("ioi", model, 24))
    assert not found.can_do and found.sentence.startswith("bizzaro-nano cannot do ioi (S2): it prefers the clean answer on")


@pytest.mark.slow
def test_gemma_can_do_ioi_and_no_multiple_choice(gemma):
    found = {choice: ability(gemma, make_task("ioi", gemma, 12, corruption=choice)) for choice in ("S2", "names")}
    assert all(a.can_do and a.preferred.value == 1 for a in found.values())
    assert found["S2"].table.ld_clean.tolist() == found["names"].table.ld_clean.tolist()
    assert (found["S2"].table.ld_corrupt < 0).all(), "the sentence then asks for the other name"
    assert abs(found["names"].table.ld_corrupt.mean()) < found["S2"].table.ld_corrupt.abs().mean() / 3, "neither name is there"
    assert not ability(gemma, make_task("multiple_choice", gemma, 16)).can_do
    docs = ability(gemma, make_task("docstring", gemma, 6, corruption="answer"))
    assert docs.first.value == 1 and docs.table.corrupt_first.all(), "the corrupted prompt is a question too, and is answered"
