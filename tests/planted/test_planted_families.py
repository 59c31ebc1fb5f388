"""The planted circuits in the shapes of Gemma 2 and Gemma 3: what is true stays true."""
import pytest
import torch
from bare_planted import bare, edge_effects, heads, ld
from transformers import AutoModelForCausalLM

from bizzaroworld.model.load import load_model
from bizzaroworld.planted.families import WINDOW, build_as
from bizzaroworld.planted.scoreboard import asked, edges_of, exact, exact_given, scoreboard
from bizzaroworld.planted.truth import outside, truth_of
from bizzaroworld.planted.variants import VARIANTS, plant
from bizzaroworld.planted.weights import save

GEMMAS = ("gemma2", "gemma3")


@pytest.fixture(scope="module", params=[(family, name) for family in GEMMAS for name in VARIANTS], ids="-".join)
def planted(request):
    return plant(request.param[1], n=2, seed=5, family=request.param[0])


def test_the_shape_is_that_of_the_family():
    gemma2, gemma3 = (build_as(family, VARIANTS["plain"].plan) for family in GEMMAS)
    assert gemma2.config.attn_logit_softcapping == 50 and gemma2.config.final_logit_softcapping == 200
    assert hasattr(gemma3.model.layers[0].self_attn, "q_norm") and not hasattr(gemma2.model.layers[0].self_attn, "q_norm")
    for model in (gemma2, gemma3):
        windows = [layer.self_attn.sliding_window for layer in model.model.layers]
        assert windows == [WINDOW, WINDOW, WINDOW, None, None, WINDOW] and WINDOW < 6  # shorter than the prompts
        assert hasattr(model.model.layers[0], "post_feedforward_layernorm")


def test_the_same_nodes_and_inputs_matter(planted):
    truth = truth_of(planted.variant)
    scores = exact(sites=("z", "mlp_out", "q", "k", "v"))(planted.model, planted.pairs)
    expected = {n for n in (*truth.nodes, *truth.inputs) if n not in truth.masked}
    assert {n for n, s in scores.items() if abs(s) > 0.1} == expected
    assert max(abs(s) for n, s in scores.items() if n not in expected) < (5e-3 if planted.family == "gemma2" else 1e-3)  # its cap makes of twice an answer a little less


def test_every_question_finds_what_it_must(planted):
    table = asked([planted])
    assert "resid_mid" in planted.model.sites and table.right.all(), table[~table.right].to_string()


@torch.no_grad()
def test_surgery(planted):
    truth, hf, (tp, *_) = truth_of(planted.variant), bare(planted), planted.pairs
    whole = ld(hf(input_ids=torch.tensor([tp.clean_ids])).logits, tp).item()
    def cut(nodes):
        hf = bare(planted)
        for n in nodes:
            out = hf.model.layers[n.layer].self_attn.o_proj.weight if n.site == "z" else hf.model.layers[n.layer].mlp.down_proj.weight
            out[:, heads(n) if n.site == "z" else slice(None) if n.head is None else n.head] = 0
        return ld(hf(input_ids=torch.tensor([tp.clean_ids])).logits, tp).item()
    assert 9.98 < whole < 10.01 and cut(outside(planted, truth)) == pytest.approx(whole, abs=3e-3)
    for n in truth.nodes: assert (cut([n]) > whole - 3e-3) if n in truth.masked else (cut([n]) < 0.51 * whole), n


@pytest.mark.parametrize("family, name", [("gemma2", "saturated"), ("gemma3", "plain"), ("gemma3", "backup"), ("gemma3", "cancelled")])
def test_the_same_edges_matter_through_the_norms_behind_the_sublayers(family, name):
    p, truth = plant(name, n=1, family=family), truth_of(VARIANTS[name])
    edges = edges_of(p.model, p.pairs)
    effects = dict(zip(edges, edge_effects(p, edges, p.pairs[0])))
    alone = set(truth.edges) - truth.masked
    assert {e for e, effect in effects.items() if abs(effect) > 0.1} == alone
    assert max(abs(effect) for e, effect in effects.items() if e not in alone) < (5e-3 if family == "gemma2" else 1e-3)


@pytest.mark.parametrize("family", GEMMAS)
@pytest.mark.parametrize("name", ["backup", "cancelled", "spread"])
def test_the_right_question_finds_every_circuit(family, name):
    assert scoreboard({"given": exact_given(at=("entity", "final"))}, [plant(name, n=1, family=family)]).exact.all()


def test_a_saved_gemma_is_an_ordinary_checkpoint(tmp_path):
    hf = build_as("gemma3", VARIANTS["plain"].plan)
    save(hf, tmp_path)
    ids = torch.tensor([[0, 1, 6, 12, 2, 24]])
    again, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"), load_model(tmp_path, device="cpu")
    assert type(again) is type(hf) and torch.equal(again(ids).logits, hf(ids).logits)
    assert torch.allclose(loaded.logits(ids), hf(ids).logits[:, -1], atol=1e-4)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="Unknown family 'gpt2'"): plant("plain", family="gpt2")
