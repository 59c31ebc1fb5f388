"""Many names in one prompt: the runs are the model's own, and a value that is replaced is replaced there and nowhere else."""
import pandas as pd
import pytest
import torch

from bizzaroworld.lookup.asking import Passes, answers, as_pairs, ask, donated, donors_of, final_states, fitting, means_at, read
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep

PROMPT = "The capital of {name} is the city of"


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def asked(nano):
    names = ["Japan", "Russia", "Germany", "France"]
    capitals = {"Japan": "Tokyo", "Russia": "Moscow", "Germany": "Berlin", "France": "Paris"}
    people = pd.DataFrame([[a, b, capitals[b]] for a in names for b in names if a != b], columns=["first", "last", "answer"])
    return ask(nano, people, PROMPT)


def plain(model, asked): return torch.cat([model.run(row[None]) for row in asked.ids])


def test_runs_on_shared_keys_are_the_plain_runs(nano, asked):
    assert Passes.of(nano, asked).start == asked.first
    for at_once in (1, 5, 64): torch.testing.assert_close(final_states(nano, asked, at_once=at_once), plain(nano, asked), rtol=0, atol=2e-5)


def test_names_that_share_their_first_token_still_run_from_the_name_on(nano, asked):
    some = asked.only([0, 1, 2])
    assert Passes.of(nano, some).start == asked.first
    torch.testing.assert_close(final_states(nano, some), plain(nano, some), rtol=0, atol=2e-5)


def test_what_is_read_is_what_the_plain_run_holds(nano, asked):
    seen = {}
    with nano.hooked([("z", 3, lambda act: seen.setdefault("z", act.clone())), ("pre", 2, lambda act: seen.setdefault("pre", act.clone()))]): nano.run(asked.ids)
    found = read(nano, asked, [("z", 3), ("pre", 2)], "last", at_once=5)
    torch.testing.assert_close(found["z", 3], seen["z"][:, asked.last], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["pre", 2], seen["pre"][:, asked.last], rtol=0, atol=2e-5)


def test_pre_is_what_the_nonlinearity_gets(nano, asked):
    found = read(nano, asked, [("pre", 1), ("neurons", 1), ("resid_mid", 1)])
    mlp, norm = nano.hf.model.layers[1].mlp, nano.hf.model.layers[1].post_attention_layernorm
    gate = torch.nn.functional.linear(norm(found["resid_mid", 1]), mlp.gate_proj.weight)
    torch.testing.assert_close(found["pre", 1], gate, rtol=1e-4, atol=1e-4)


def test_a_persons_own_values_change_nothing(nano, asked):
    edits = [Edit("mlp_out", 2, "last", source="given"), Edit("z", 4, "final", 1, "given"), Edit("neurons", 1, "last", None, "given"), Edit("neurons", 3, "last", 7, "given")]
    own = {}
    for e in edits:
        there = read(nano, asked, [(e.site, e.layer)], e.position)[e.site, e.layer]
        own[e] = there if e.head is None else there[:, e.head]
    torch.testing.assert_close(final_states(nano, asked, own), final_states(nano, asked), rtol=0, atol=2e-5)


def test_somebody_elses_name_gives_somebody_elses_answer(nano, asked):
    order = torch.from_numpy(donors_of(asked))
    edits = [Edit("resid_pre", 0, at, source="given") for at in ("first", "last")]
    torch.testing.assert_close(final_states(nano, asked, donated(nano, asked, edits)), final_states(nano, asked)[order], rtol=0, atol=2e-5)


@pytest.mark.parametrize("edit", [Edit("mlp_out", 1, "last", source="given"), Edit("z", 5, "final", 2, "given"), Edit("neurons", 1, "last", 11, "given")], ids=str)
def test_replaced_values_agree_with_a_sweep(nano, asked, edit):
    "Means and donors, against the engine of the study."
    pairs = as_pairs(nano, asked)
    donor = Edit(edit.site, edit.layer, {"last": "entity"}.get(edit.position, edit.position), edit.head)
    swept = sweep(nano, pairs, donor, metrics=["logprob"]).patched[:, 0, 0]
    found = answers(nano, asked, final_states(nano, asked, donated(nano, asked, [edit])))
    assert abs(found.loss + swept).max() < 1e-4
    means = means_at(nano, asked, [edit])
    given = Edit(donor.site, donor.layer, donor.position, donor.head, "given")
    swept = sweep(nano, pairs, given, metrics=["logprob"], values={given: means[edit]}).patched[:, 0, 0]
    assert abs(answers(nano, asked, final_states(nano, asked, means)).loss + swept).max() < 1e-4


def test_answers_are_read_off_the_logits(nano, asked):
    states = final_states(nano, asked)
    logits = nano.logits(asked.ids).detach().double()
    found, choices = answers(nano, asked, states, clean=states.roll(1, 0)), logits[:, list(asked.choice_ids)]
    assert (found.right == (choices.argmax(1) == asked.right).numpy()).all() and 0 < found.right.sum()
    own = choices.gather(1, asked.right[:, None])[:, 0]
    assert abs(found.ld - (own - (choices.sum(1) - own) / 3).numpy()).max() < 1e-4
    logp = logits.log_softmax(-1)
    assert abs(found.loss + logp[range(len(asked)), [asked.choice_ids[i] for i in asked.right]].numpy()).max() < 1e-4
    other = logp.roll(1, 0)
    assert abs(found.kl - (other.exp() * (other - logp)).sum(1).numpy()).max() < 1e-3


def test_donors_have_another_answer_and_are_drawn_the_same_way_again(asked):
    order = donors_of(asked, 3)
    first, last = asked.people["first"].to_numpy(), asked.people["last"].to_numpy()
    assert (first[order] != first).all() and (last[order] != last).all()
    assert (asked.people["answer"].to_numpy()[order] != asked.people["answer"].to_numpy()).all() and (order == donors_of(asked, 3)).all()
    assert (order != donors_of(asked, 4)).any()


def test_what_cannot_be_asked_is_refused_by_name(nano, asked):
    people = asked.people
    for prompt in ("The capital is", "{name} or {name} is", "{name} is {so}", "one_shoot"):
        with pytest.raises(ValueError, match="one_shot, bare.*holds {name} once"): ask(nano, people, prompt)
    with pytest.raises(ValueError, match="no column 'answer'"): ask(nano, people[["first", "last"]], PROMPT)
    with pytest.raises(ValueError, match="empty"): ask(nano, people[:0], PROMPT)
    with pytest.raises(ValueError, match="1 of 12 names are not two tokens.*Xylophonia Japan"): ask(nano, people.assign(first=["Xylophonia", *people["first"][1:]], last=["Japan", *people["last"][1:]]), PROMPT)
    with pytest.raises(ValueError, match="none of"): ask(nano, people, PROMPT, ["Paris"])
    with pytest.raises(ValueError, match="Unknown position"): asked.at("middle")
    with pytest.raises(ValueError, match="same there"): final_states(nano, asked, {Edit("mlp_out", 0, 1, source="given"): torch.zeros(nano.d_model)})
    with pytest.raises(ValueError, match="2 values for 12"): final_states(nano, asked, {Edit("mlp_out", 0, "last", source="given"): torch.zeros(2, nano.d_model)})
    with pytest.raises(ValueError, match="layers 0 to"): final_states(nano, asked, {Edit("mlp_out", 99, "last", source="given"): torch.zeros(nano.d_model)})
    with pytest.raises(ValueError, match="All 3 people"): donors_of(asked.only(people["answer"].to_numpy() == "Paris"))


def test_a_name_at_the_beginning_may_be_other_tokens(nano, asked):
    "Where no space stands before it; those that fit are asked, and in the middle of a prompt others do."
    table = pd.concat([asked.people, pd.DataFrame([["Xylophonia", "Japan", "Tokyo"]], columns=["first", "last", "answer"])])
    for prompt, before in ((PROMPT, " "), ("{name} has the capital", "")):
        pieces = [len(nano.tokenizer(f"{before}{a} {b}", add_special_tokens=False)["input_ids"]) for a, b in zip(table["first"], table["last"])]
        assert fitting(nano, table, prompt)["last"].tolist() == table["last"][[n == 2 for n in pieces]].tolist()
    assert len(fitting(nano, table, PROMPT)) == 12
