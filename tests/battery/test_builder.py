"""The builder of batteries: who may be paired, what is known to which degree, that no fact is used twice, and that the lot is the seed's."""
from random import Random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bizzaroworld.battery.builder import (Asked, Question, ask, best_templates, build_battery, candidates, choose, halves, questions_from,
                                          questions_of, tokenized)
from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align

TEMPLATES = ("The capital of {e} is", "In {e} the capital is")
FACTS = {"Peru": "Lima", "Cuba": "Havana", "Chile": "Santiago", "Spain": "Madrid", "Chad": "Djamena", "Mali": "Bamako"}


def question(entity, answer=None, template=TEMPLATES[0], relation="capital", given=""):
    return Question(relation, "capitals", template, entity, " " + (answer or FACTS[entity]), given)


class Oracle:
    """A model that knows what it is told: `known[entity]` is how sure it is of its answer, in logits; other answers have 0, `the` has 3."""
    device = torch.device("cpu")

    def __init__(self, known, templates=TEMPLATES):
        words = ["The", "In", "capital", "of", "the", "is", *FACTS, *FACTS.values()]
        vocabulary = {w: i for i, w in enumerate(["<bos>", "<unk>", *words])}
        tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", unk_token="<unk>")
        self.vocabulary, self.known, self.templates, self.asked = vocabulary, known, templates, 0
        self.d_vocab = len(vocabulary)

    def logits(self, ids):
        self.asked += len(ids)
        out = torch.zeros(len(ids), len(self.vocabulary))
        out[:, self.vocabulary["the"]] = 3.0
        for row, prompt in enumerate(ids.tolist()):
            entity = next(e for e in FACTS if self.vocabulary[e] in prompt)
            if prompt[1] == self.vocabulary[self.templates[0].split()[0]] or len(self.templates) > 1:
                out[row, self.vocabulary[FACTS[entity]]] = self.known.get(entity, 0.0)
        return out


EVERY = [question(e, template=t) for t in TEMPLATES for e in FACTS]


def test_a_pair_is_preferred_first_of_its_kind_and_first_of_all():
    model = Oracle({"Peru": 5.0, "Cuba": 4.0, "Chile": 2.5, "Spain": 2.0})
    built = build_battery(model, EVERY, templates=1)
    degree = dict(zip(built.table.pair_id, built.table.degree))
    pairs = {frozenset((p.clean_entity, p.corrupt_entity)): degree[p.id] for p in built.pairs}
    assert pairs == {frozenset(("Peru", "Cuba")): "first_of_all", frozenset(("Chile", "Spain")): "first_of_kind"}, "`the` has 3"
    assert built.summary().pairs.tolist() == [2, 2, 1]


def test_total_swing_is_what_two_runs_give():
    model = Oracle({"Peru": 5.0, "Cuba": 4.0})
    (pair,), table = build_battery(model, EVERY).pairs, build_battery(model, EVERY).table
    tp = align(model.tokenizer, pair)
    clean, corrupt = model.logits(torch.tensor([tp.clean_ids, tp.corrupt_ids]))
    ld = [run[tp.clean_target_id] - run[tp.corrupt_target_id] for run in (clean, corrupt)]
    assert table.total_swing.item() == pytest.approx((ld[0] - ld[1]).item()) and ld[0] > 0 > ld[1]


def test_the_threshold_and_the_degree_leave_pairs_out():
    model = Oracle({"Peru": 5.0, "Cuba": 4.0, "Chile": 0.75, "Spain": 0.75})
    assert len(build_battery(model, EVERY, min_swing=2.0).pairs) == 1
    assert len(build_battery(model, EVERY, min_swing=1.0).pairs) == 2
    assert len(build_battery(model, EVERY, min_swing=1.0, degree="first_of_all").pairs) == 1
    with pytest.raises(ValueError, match="'known'.*preferred"): build_battery(model, EVERY, degree="known")


def test_a_model_that_prefers_another_answer_has_no_pair():
    logits = np.array([[5.0, 1], [6.0, 4]])  # the second question prefers the first one's answer
    two = [Asked(question("Peru"), (1, 2), (1, 2), 7), Asked(question("Cuba"), (1, 3), (1, 2), 8)]
    assert len(candidates(two, logits, np.array([True, False]), [7, 8], 0.0)) == 0
    logits[1, 0] = 3.0
    assert candidates(two, logits, np.array([True, False]), [7, 8], 0.0).to_dict("records") == [
        {"clean": 0, "corrupt": 1, "total_swing": 5.0, "degree": 1}]


def test_only_questions_of_one_slot_are_paired():
    a = Asked(question("Peru"), (1, 2, 3), (1, 2), 7)
    others = [Asked(question("Cuba", template=TEMPLATES[1]), (1, 2, 3), (1, 2), 8), Asked(question("Cuba"), (1, 2, 3, 4), (1, 2), 8),
              Asked(question("Cuba"), (1, 2, 3), (1, 3), 8)]
    for other in others:
        assert len(candidates([a, other], np.array([[9.0, 0], [0, 9.0]]), np.ones(2, bool), [7, 8], 0.0)) == 0
    same = Asked(question("Cuba"), (1, 2, 5), (1, 2), 8)
    assert len(candidates([a, same], np.array([[9.0, 0], [0, 9.0]]), np.ones(2, bool), [7, 8], 0.0)) == 1


@given(n=st.integers(2, 9), n_answers=st.integers(2, 4), most=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_fact_is_used_twice_and_better_known_pairs_come_first(n, n_answers, most, seed):
    rng = np.random.default_rng(seed)
    asked = [Asked(Question("r", "c", "{e} is", f"e{i}", f" a{i % n_answers}"), (0, i), (1, 2), i % n_answers) for i in range(n)]
    pairs = [(i, j) for i in range(n) for j in range(i) if (i - j) % n_answers]
    found = pd.DataFrame(pairs, columns=["clean", "corrupt"]).assign(degree=rng.integers(0, 3, len(pairs)))
    used = set()
    rows = choose(found, asked, most, used, Random(seed))
    facts = [asked[i].question.fact for r in rows for i in found.loc[r, ["clean", "corrupt"]]]
    assert len(set(facts)) == len(facts) == len(used) and len(rows) <= most
    assert list(found.degree[rows]) == sorted(found.degree[rows], reverse=True)
    if len(rows) < most: assert all({asked[a].question.fact, asked[b].question.fact} & used for a, b in pairs), "nothing was left to take"


def test_answers_take_turns():
    asked = [Asked(Question("r", "c", "{e} is", f"e{i}", f" a{t}"), (0, i), (1, 2), t) for i, t in enumerate([0, 0, 0, 1, 1, 1, 2, 3])]
    pairs = [(i, j) for i in range(8) for j in range(i) if asked[i].target != asked[j].target]
    found = pd.DataFrame(pairs, columns=["clean", "corrupt"]).assign(degree=0)
    for seed in range(5):
        rows = choose(found, asked, 2, set(), Random(seed))
        assert {asked[i].target for r in rows for i in found.loc[r, ["clean", "corrupt"]]} == {0, 1, 2, 3}


def test_templates_that_the_model_follows_are_kept():
    model = Oracle({e: 5.0 for e in FACTS}, templates=TEMPLATES[:1])
    asked = tokenized(model.tokenizer, EVERY)
    facts = {a.question.fact for a in asked}
    assert best_templates(model, asked, 1, facts) == [TEMPLATES[0]]
    assert best_templates(model, asked, 5, facts)[0] == TEMPLATES[0]


def test_asking_does_not_depend_on_the_batch():
    model = Oracle({"Peru": 5.0, "Cuba": 4.0})
    asked = tokenized(model.tokenizer, EVERY)
    answers = sorted({a.target for a in asked})
    alone, together = ask(model, asked, answers, size=1), ask(model, asked, answers, size=64)
    assert (alone[0] == together[0]).all() and (alone[1] == together[1]).all()


def test_a_question_whose_answer_is_two_tokens_or_whose_entity_is_cut_is_left_out():
    model = Oracle({})
    odd = [question("Peru", "Lima Havana"), question("Peru", "Paris"), question("Cuba")]
    assert [a.question.entity for a in tokenized(model.tokenizer, odd)] == ["Peru", "Cuba"], "an unknown word is one token here; align refuses it"
    with pytest.raises(ValueError, match="No question can be asked"): build_battery(model, odd[:1])


def test_the_seed_decides_and_nothing_else():
    model = Oracle({e: 5.0 + i for i, e in enumerate(FACTS)})
    first, again, other = (build_battery(model, questions, seed=seed) for questions, seed in ((EVERY, 0), (EVERY, 0), (EVERY, 1)))
    assert first.pairs == again.pairs and first.pairs != other.pairs
    more = build_battery(model, [question("Peru", relation="a"), question("Cuba", relation="a"), *EVERY], seed=0)
    assert set(first.table.columns) == set(more.table.columns) and len(more.pairs) == 3, "a fact that one relation used is not used again"


def test_questions_of_the_tables_are_true_sentences():
    tables = load_facts()
    asked = questions_of(tables)
    assert len({(q.prompt, q.answer) for q in asked}) == len(asked) > 40_000
    assert all(q.answer.count(" ") == 1 and "{" not in q.prompt and q.entity in q.prompt for q in asked)
    assert {q.relation for q in asked} == {r.name for r in tables.relations}


def test_a_fact_with_an_operand_is_the_same_either_way_around():
    a, b = (Question("addition", "sums", f"{{e}} and {given} make", entity, " nine", given) for entity, given in (("six", "three"), ("three", "six")))
    assert a.fact == b.fact != Question("addition", "sums", "{e} and two make", "six", " eight", "two").fact


def test_questions_from_pairs_ask_what_the_pairs_ask():
    battery = load_battery()
    asked = questions_from(battery)
    assert {(q.prompt, q.answer) for q in asked} == {side for p in battery for side in (
        (p.clean_prompt, p.clean_target), (p.corrupt_prompt, p.corrupt_target))}


def test_halves_share_nothing_and_keep_relations_in_proportion():
    pairs = [SimpleNamespace(id=f"{r}{i}", relation=r) for r, n in (("a", 10), ("b", 7), ("c", 3)) for i in range(n)]
    one, two = halves(pairs)
    assert {p.id for p in one} | {p.id for p in two} == {p.id for p in pairs} and len(one) + len(two) == len(pairs)
    for r in "abc": assert abs(sum(p.relation == r for p in one) - sum(p.relation == r for p in two)) <= 1
    assert abs(len(one) - len(two)) <= 1 and halves(pairs) == (one, two) and halves(pairs, seed=1) != (one, two)


def test_a_second_start_goes_on_where_the_first_stopped(tmp_path):
    notes, model = tmp_path / "notes.jsonl", Oracle({e: 5.0 + i for i, e in enumerate(FACTS)})
    asked = [question(e, relation=r) for r, entities in (("a", ("Peru", "Cuba")), ("b", ("Chile", "Spain")), ("c", ("Chad", "Mali"))) for e in entities]
    whole = build_battery(model, asked)

    def stop(done, total, note):
        if note == "c": raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): build_battery(model, asked, notes=notes, progress=stop)
    model.asked = 0
    again = build_battery(model, asked, notes=notes)
    assert again.pairs == whole.pairs and again.table.equals(whole.table)
    assert model.asked == 4, "two questions of the last relation, each for the choice of the template and for the pair"
    other = build_battery(model, asked, notes=notes, min_swing=99.0)
    assert other.pairs == (), "notes of another building are not used"
    notes.write_text(notes.read_text()[:-20])
    assert build_battery(model, asked, notes=notes).pairs == whole.pairs, "nor damaged ones"


def test_facts_that_were_used_before_the_stop_stay_used(tmp_path):
    notes, model = tmp_path / "notes.jsonl", Oracle({e: 5.0 for e in FACTS})
    asked = [question("Peru", relation="a"), question("Cuba", relation="a"), *EVERY]
    whole = build_battery(model, asked)

    def stop(done, total, note):
        if note == "capital": raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): build_battery(model, asked, notes=notes, progress=stop)
    assert build_battery(model, asked, notes=notes).pairs == whole.pairs


def test_what_is_saved_is_a_battery(tmp_path):
    built = build_battery(Oracle({"Peru": 5.0, "Cuba": 4.0}), EVERY)
    built.save(tmp_path / "mine.json")
    assert tuple(load_battery(tmp_path / "mine.json")) == built.pairs


def test_a_question_with_a_token_that_the_model_has_no_embedding_for_is_named():
    model = Oracle({"Peru": 5.0, "Cuba": 4.0})
    model.d_vocab -= 1
    with pytest.raises(ValueError, match=f"is.*: a token id is outside 0 to {model.d_vocab - 1}: {model.d_vocab}"): build_battery(model, EVERY)


def test_two_pairs_about_the_same_entities_have_ids_of_their_own(tmp_path):
    def asked(word, answers): return [Question("pairs", "pairs", f"The {word} of {{e}} is", e, f" {a}") for e, a in zip(("Peru", "Cuba"), answers)]

    class Two(Oracle):
        def logits(self, ids):
            out = super().logits(ids)
            for row, prompt in enumerate(ids.tolist()):
                if self.vocabulary["the"] in prompt: out[row, self.vocabulary["Chile" if self.vocabulary["Peru"] in prompt else "Spain"]] = 9.0
            return out
    built = build_battery(Two({"Peru": 5.0, "Cuba": 4.0}), asked("capital", ("Lima", "Havana")) + asked("the", ("Chile", "Spain")), min_swing=1.0)
    assert len(built.pairs) == len({p.id for p in built.pairs}) == 2
    built.save(tmp_path / "b.json")
    assert tuple(load_battery(tmp_path / "b.json")) == built.pairs
