"""Every task on several families of tokenizers: what its prompts say is worked out from their text."""
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bizzaroworld.battery.facts import load_facts, templates_of
from bizzaroworld.model.load import load_tokenizer
from bizzaroworld.patch.interventions import positions_of
from bizzaroworld.tasks.arithmetic import SIGNS, arithmetic
from bizzaroworld.tasks.choices import QUESTIONS, multiple_choice
from bizzaroworld.tasks.registry import TASKS, make_task, task_table

EMBEDDED, SHARED = ("bizzaro-nano", "bizzaro-micro"), ("gemma-1", "gemma-3", "gpt2", "pythia")
EACH = [(name, choice) for name, recipe in TASKS.items() for choice in recipe.corruptions]
UNEVEN = ("facts", "paired_facts")  # no wordings that could take turns
SEEDS = st.integers(0, 10**9)


@pytest.fixture(scope="module", params=[*EMBEDDED, *SHARED])
def tok(request):
    if request.param in EMBEDDED: return load_tokenizer(request.param)
    folders = request.getfixturevalue("tokenizer_folders")
    if request.param not in folders: pytest.skip(f"no tokenizer of {request.param} here")
    return AutoTokenizer.from_pretrained(folders[request.param])


def text_at(tok, ids, where):
    """What stands at some positions, without the space before it."""
    return tok.decode([ids[i] for i in where]).strip()


def check(tok, task):
    """What every task promises of every pair."""
    assert len({tp.clean_ids for tp in task.pairs}) == len(task) == len({tp.id for tp in task.pairs})
    assert set(task.noised) <= set(task.places) <= set(TASKS[task.name].places)
    for tp in task.pairs:
        at, p = dict(tp.places), tp.pair
        assert set(task.places) <= set(at)
        assert len(tp.clean_ids) == len(tp.corrupt_ids) and all(0 < i <= tp.final for where in at.values() for i in where)
        replaced = {i for place in task.noised for i in at[place]}
        assert set(tp.differing) <= replaced and tp.final not in replaced
        assert all(set(at[place]) & set(tp.differing) for place in task.noised)
        for ids, prompt, target, tid in ((tp.clean_ids, p.clean_prompt, p.clean_target, tp.clean_target_id),
                                         (tp.corrupt_ids, p.corrupt_prompt, p.corrupt_target, tp.corrupt_target_id)):
            assert ids[0] == tok.bos_token_id and ids[1:] == tuple(tok(prompt, add_special_tokens=False)["input_ids"])
            for other in (p.clean_target, p.corrupt_target):
                assert tuple(tok(prompt + other, add_special_tokens=False)["input_ids"])[:-1] == ids[1:]
            assert tok(prompt + target, add_special_tokens=False)["input_ids"][-1] == tid
        clean, corrupt = map(set, tp.answers)
        assert tp.clean_target_id in clean and tp.corrupt_target_id in corrupt and not clean & corrupt
    counts = task.wordings.values()
    assert sum(counts) == len(task) and (task.name in UNEVEN or max(counts) - min(counts) <= 1)


@pytest.mark.parametrize("name, choice", EACH)
def test_what_every_task_promises(tok, name, choice):
    @settings(max_examples=2)
    @given(SEEDS)
    def holds(seed): check(tok, make_task(name, tok, 12, seed, choice))
    holds()


@pytest.mark.parametrize("name", TASKS)
def test_the_clean_prompts_are_the_same_for_all_corruptions(tok, name):
    tasks = [make_task(name, tok, 12, 3, choice) for choice in TASKS[name].corruptions]
    assert len({tuple(tp.clean_ids for tp in task.pairs) for task in tasks}) == 1
    assert len({tuple(tp.corrupt_ids for tp in task.pairs) for task in tasks}) == len(tasks)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_is_a_set_of_pairs(tok, name):
    one, same, other = (make_task(name, tok, 10, seed) for seed in (1, 1, 2))
    assert one == same and one.pairs != other.pairs
    assert one.pairs == make_task(name, tok, 20, 1).pairs[:10] or name in UNEVEN, "more pairs are the same ones, and others behind"


@pytest.mark.parametrize("name, choice", EACH)
def test_sixty_pairs(tok, name, choice):
    assert len(make_task(name, tok, 60, 0, choice)) == 60


@pytest.mark.slow
@pytest.mark.weekly
def test_it_is_the_same_in_another_process():
    """Nothing hangs on the order of a set."""
    code = ("from bizzaroworld.model.load import load_tokenizer\nfrom bizzaroworld.tasks.registry import TASKS, make_task\nimport hashlib\n"
            "tok = load_tokenizer('bizzaro-micro')\nprint(hashlib.sha256(repr([make_task(n, tok, 6) for n in TASKS]).encode()).hexdigest())")
    shown = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True,
                            text=True).stdout for seed in ("1", "2")}
    assert len(shown) == 1


@pytest.mark.parametrize("choice", TASKS["ioi"].corruptions)
def test_ioi_names_stand_where_the_places_say(tok, choice):
    task = make_task("ioi", tok, 24, 5, choice)
    orders = Counter()
    for tp in task.pairs:
        p, at = tp.pair, dict(tp.places)
        clean, corrupt = ({k: text_at(tok, ids, at[k]) for k in ("IO", "S1", "S2")} for ids in (tp.clean_ids, tp.corrupt_ids))
        io, s = p.clean_target.strip(), p.corrupt_target.strip()
        assert clean == {"IO": io, "S1": s, "S2": s} and io != s
        assert [len(re.findall(rf"\b{name}\b", p.clean_prompt)) for name in (io, s)] == [1, 2]
        new = [name for name in corrupt.values() if name not in (io, s)]
        assert len(set(new)) == len(new) == {"S2": 0, "S1+IO": 2, "names": 3}[choice]
        assert corrupt["S2"] == {"S2": io, "S1+IO": s}.get(choice, corrupt["S2"])
        assert at["S1+1"] == (at["S1"][0] + 1,)
        order = "ABBA" if at["IO"] < at["S1"] else "BABA"
        assert p.relation.endswith(order)
        orders[order] += 1
    assert set(orders.values()) == {12}


def test_greater_than_sets_are_the_years_above_and_the_others(tok):
    task = make_task("greater_than", tok, 30, 5)
    for tp in task.pairs:
        (year, given), (low, same) = (re.findall(r"\d+", text) for text in (tp.pair.clean_prompt, tp.pair.corrupt_prompt))
        assert given == same and year.startswith(given) and low == given + {2: "01", 3: "0"}[len(given)]
        above, below = ([int(given + tok.decode([i]).strip()) for i in ids] for ids in tp.answers)
        assert min(above) > int(year) >= max(below)
        every = sorted(above + below)
        assert len(every) == len(set(every)) >= {2: 80, 3: 10}[len(given)]
        assert int(given + tp.pair.corrupt_target) > int(low), "the corrupted prompt allows its answer"
        assert text_at(tok, tp.clean_ids, dict(tp.places)["YY"]) == year.removeprefix(given)
    forms = {tp.pair.relation.split(", ")[1] for tp in task.pairs}
    assert len(forms) == 1


def test_greater_than_finds_the_form(tokenizer_folders):
    found = {name: make_task("greater_than", AutoTokenizer.from_pretrained(tokenizer_folders[name]), 1).pairs[0].pair.relation
             for name in SHARED if name in tokenizer_folders}
    for name, wording in found.items(): assert wording.endswith("two digits" if name in ("gpt2", "pythia") else "last digit")


def arguments(prompt):
    """The arguments of the definition, and those that the docstring describes."""
    given = re.search(r"def \w+\(self, (.*)\):", prompt)[1].split(", ")
    return given, re.findall(r"^    (?::param|@param|-) (\w+):", prompt, re.M)


@pytest.mark.parametrize("choice", TASKS["docstring"].corruptions)
def test_docstring_asks_for_the_third_argument(tok, choice):
    task = make_task("docstring", tok, 15, 5, choice)
    for tp in task.pairs:
        (clean, docs), (corrupt, other_docs) = arguments(tp.pair.clean_prompt), arguments(tp.pair.corrupt_prompt)
        assert docs == clean[:2] and len(clean) == 4 == len(set(clean))
        assert (clean[2], corrupt[2]) == (tp.pair.clean_target.strip(), tp.pair.corrupt_target.strip()) and clean[3] == corrupt[3]
        kept = [a == b for a, b in zip(clean[:3], corrupt)]
        assert kept == ([False] * 3 if choice == "definition" else [True, True, False])
        assert [a == b for a, b in zip(docs, other_docs)] == [choice != "answer and docs"] * 2
        assert clean[2] not in corrupt + other_docs and corrupt[2] not in clean + docs
        at = dict(tp.places)
        assert [text_at(tok, tp.clean_ids, at[k]) for k in ("A_def", "B_def", "C_def", "A_doc", "B_doc")] == [*clean[:3], *docs]
        assert [text_at(tok, tp.corrupt_ids, at[k]) for k in ("A_def", "B_def", "C_def", "A_doc", "B_doc")] == [*corrupt[:3], *other_docs]


def solved(name, line):
    """The two operands of a line and their answer, worked out here."""
    a, b = map(int, re.findall(r"\d", line)[:2])
    return a, b, {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[name]


@pytest.mark.parametrize("name, choice", [(name, choice) for name in SIGNS for choice in ("first", "second")])
def test_arithmetic_is_right_and_its_examples_do_not_tell(tok, name, choice):
    for tp in make_task(name, tok, 15, 5, choice).pairs:
        p, at = tp.pair, dict(tp.places)
        (*examples, clean), (*others, corrupt) = p.clean_prompt.split("\n"), p.corrupt_prompt.split("\n")
        a, b, c = solved(name, clean)
        x, y, z = solved(name, corrupt)
        assert (c, z) == (int(p.clean_target), int(p.corrupt_target)) and c != z
        assert (a == x, b == y) == (choice == "second", choice == "first")
        assert (text_at(tok, tp.clean_ids, at["a"]), text_at(tok, tp.clean_ids, at["b"])) == (str(a), str(b))
        assert examples == others and len(examples) == 1
        for line in examples:
            assert solved(name, line)[2] == int(re.findall(r"\d", line)[2]) and int(re.findall(r"\d", line)[2]) not in (c, z)


def test_arithmetic_after_other_numbers_of_examples():
    tok = load_tokenizer("bizzaro-micro")
    assert {tp.pair.clean_prompt.count("\n") for tp in arithmetic(tok, n=6, shots=3)} == {3}
    with pytest.raises(ValueError, match="Ask for n=39"): arithmetic(tok, n=60, name="multiplication", shots=0)  # 13 products in 3 wordings


def test_multiple_choice_letters_are_right_and_in_even_shares(tok):
    letters = Counter()
    for tp in make_task("multiple_choice", tok, 24, 5).pairs:
        p, at = tp.pair, dict(tp.places)
        sides = []
        for prompt, target in ((p.clean_prompt, p.clean_target), (p.corrupt_prompt, p.corrupt_target)):
            last = prompt.split("\n\n")[-1]
            question = last.split("\n")[0].removeprefix("Question: ")
            options = dict(re.findall(r"^\(?([A-D])[.)] (\w+)$", last, re.M))
            assert sorted(options.values()) == sorted(QUESTIONS[question]) and list(options) == list("ABCD")
            assert options[target.strip()] == QUESTIONS[question][0]
            sides.append((question, options))
        (question, clean), (again, corrupt) = sides
        assert question == again and sum(clean[k] != corrupt[k] for k in clean) == 2
        assert text_at(tok, tp.clean_ids, at["right"]) == QUESTIONS[question][0] == text_at(tok, tp.corrupt_ids, at["wrong"])
        letters[p.clean_target.strip()] += 1
    assert letters == dict.fromkeys("ABCD", 6)


def test_multiple_choice_with_fewer_options():
    tok = load_tokenizer("bizzaro-micro")
    assert {tp.pair.clean_target.strip() for tp in multiple_choice(tok, n=8, options=2)} == {"A", "B"}
    with pytest.raises(ValueError, match="use 2, 3 or 4"): multiple_choice(tok, options=5)


def test_no_question_has_an_option_twice_and_no_answer_in_it():
    for question, options in QUESTIONS.items():
        assert len(set(options)) == len(options) == 4 and options[0].casefold() not in question.casefold()


def test_paired_facts_are_in_the_tables_and_go_both_ways(tok):
    tables = load_facts()
    pairs = make_task("paired_facts", tok, 20, 5).pairs
    for one, other in zip(pairs[::2], pairs[1::2]):
        assert (one.clean_ids, one.corrupt_ids) == (other.corrupt_ids, other.clean_ids)
        relation = tables.relation(one.pair.relation)
        known = {f.entity: f.answer.split()[0] for f in relation.facts}
        for p in (one.pair, other.pair):
            assert (known[p.clean_entity], known[p.corrupt_entity]) == (p.clean_target.strip(), p.corrupt_target.strip())
            assert p.clean_prompt in {t.replace("{e}", p.clean_entity) for t in templates_of(tables, relation)}
    prompts = [tp.clean_ids for tp in pairs]
    assert len(set(prompts)) == 20 and len({tp.pair.relation for tp in pairs}) > 5
    assert len(make_task("paired_facts", tok, 7).pairs) == 7


@pytest.mark.parametrize("name", UNEVEN)
def test_the_subject_has_a_first_a_last_and_what_lies_between(tok, name):
    lengths = set()
    for tp in make_task(name, tok, 60).pairs:
        at = dict(tp.places)
        first, middle, last = at["subject_first"], at.get("subject_middle", ()), at["subject_last"]
        assert at["subject"] == tuple(range(*tp.entity_span)) == tuple(dict.fromkeys((*first, *middle, *last)))
        assert text_at(tok, tp.clean_ids, at["subject"]) == tp.pair.clean_entity and ("subject_middle" in at) == (len(at["subject"]) > 2)
        lengths.add(len(at["subject"]))
    assert name == "facts" or len(lengths) > 1  # most subjects of the battery are one token


def test_facts_are_the_battery_and_fewer_are_spread_over_the_categories():
    tok = load_tokenizer("bizzaro-micro")
    every = make_task("facts", tok, 60).pairs
    some = make_task("facts", tok, 8, seed=4).pairs
    assert len({tp.pair.category for tp in some}) == min(8, len({tp.pair.category for tp in every}))
    with pytest.raises(ValueError, match=r"aligns \d+ pairs of the battery and its spares, not 500"): make_task("facts", tok, 500)


def test_places_are_positions_for_the_sweep(tok):
    task = make_task("ioi", tok, 2)
    for tp in task.pairs:
        assert [positions_of(place, tp) for place in task.places] == [dict(tp.places)[place] for place in task.places]
    with pytest.raises(ValueError, match="Unknown position 'S3'"): positions_of("S3", task.pairs[0])


@pytest.mark.parametrize("asked, said", [
    (dict(name="iol"), "Unknown task 'iol'.*did you mean 'ioi'"), (dict(name="ioi", corruption="S3"), "Unknown corruption of ioi 'S3'.*'S1\\+IO'"),
    (dict(name="ioi", n=0), "n is 0"), (dict(name="ioi", corruption=""), "Unknown corruption")])
def test_what_cannot_be_asked(asked, said):
    with pytest.raises(ValueError, match=said): make_task(model_or_tokenizer=load_tokenizer("bizzaro-micro"), **asked)


def test_a_model_is_taken_for_its_tokenizer():
    class Model:
        tokenizer = load_tokenizer("bizzaro-micro")
    assert make_task("ioi", Model(), 3) == make_task("ioi", Model.tokenizer, 3)


def test_the_table_shows_every_task_or_why_not(tok):
    table = task_table(tok, n=4)
    assert list(zip(table.task, table.corruption)) == EACH and (table.pairs == 4).all() and (table.problem == "").all()


@pytest.mark.slow
def test_the_table_says_what_is_wrong():
    table = task_table(load_tokenizer("bizzaro-nano"), n=121).set_index(["task", "corruption"])
    row = table.loc[("facts", "subject")]
    assert row.pairs == 0 and "Ask for n=" in row.problem and (table.drop(index=("facts", "subject")).pairs == 121).all()
