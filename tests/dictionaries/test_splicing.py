"""Dictionaries in the model: identities, and what plain hooks on the bare Hugging Face model give."""
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny import random_pair, tiny_hf, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.dictionaries.harvest import blocks, documents
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, perfect
from bizzaroworld.dictionaries.splicing import (after_bos, changes_by, changes_of, check_fit, fits, hidden_states, mlp_entrance, read_for, sampled, splice, splice_edits, text_loss)
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import embedded_models
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

LAYER = 3
WIDTHS = {"resid_pre": 128, "attn_out": 128, "resid_mid": 128, "mlp_out": 128, "resid_post": 128, "z": 128, "q": 128, "k": 32, "v": 32, "neurons": 512}
HEADS = {"z": 4, "q": 4}
# Where the bare model has a place: the module, and whether it is what goes in or what comes out.
MODULES = {"resid_pre": ("", "in"), "attn_out": ("self_attn", "out"), "mlp_out": ("mlp", "out"), "resid_post": ("", "out"), "z": ("self_attn.o_proj", "in"), "neurons": ("mlp.down_proj", "in"),
           "mlp_in": ("mlp", "in")}


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def bare(): return AutoModelForCausalLM.from_pretrained(embedded_models()["bizzaro-nano"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pairs(model):
    "Six prompts of at least three lengths."
    found = after_bos(model, load_battery())
    lengths = sorted({len(tp.clean_ids) for tp in found})
    chosen = [next(tp for tp in found if len(tp.clean_ids) == n) for n in lengths[:3]]
    return [*chosen, *[tp for tp in found if tp not in chosen][:3]]


@pytest.fixture(scope="module")
def text(model): return blocks(model, documents("facts", 60), context=32, held=0.2)


def random_sae(d, site, layer=LAYER, heads=1, writes=None, d_out=None, seed=0, **parts):
    "A dictionary that gives back something else than it reads."
    g = torch.Generator().manual_seed(seed)
    def r(*shape): return torch.randn(shape, generator=g)
    return SAE("relu", r(d, 2 * d) / d ** 0.5, r(2 * d) * 0.1, r(2 * d, d_out or d) / d ** 0.5, r(d_out or d) * 0.1, (site, layer), writes or (site, layer), heads=heads, **parts)


@contextmanager
def hooked(hf, hooks, blocks="model.layers"):
    "Functions of what is at places of the bare model, at every token after the first `start`: `(site, layer, start, function)`."
    handles = []
    for site, layer, start, function in hooks:
        name, end = MODULES[site]
        module = hf.get_submodule(blocks)[layer].get_submodule(name) if name else hf.get_submodule(blocks)[layer]
        def change(x, start=start, function=function):
            new = function(x[:, start:])
            return x if new is None else torch.cat([x[:, :start], new], 1)
        if end == "in": handles.append(module.register_forward_pre_hook(lambda m, args, change=change: (change(args[0]), *args[1:])))
        else: handles.append(module.register_forward_hook(lambda m, args, out, change=change: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)))
    try: yield
    finally: [handle.remove() for handle in handles]


@torch.no_grad()
def difference(hf, tp, hooks=(), side="clean"):
    with hooked(hf, hooks): logits = hf(torch.tensor([getattr(tp, f"{side}_ids")])).logits[0, -1]
    return (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()


@pytest.mark.parametrize("site", WIDTHS)
def test_a_dictionary_that_gives_back_everything_changes_nothing(model, pairs, text, site):
    sae = perfect(WIDTHS[site], site, LAYER, HEADS.get(site, 1))
    for position in ("after_bos", "all", "final", ("entity", "final")):
        done = splice(model, sae, pairs, position, metrics=("ld", "kl"), progress=False)
        assert np.abs(done.patched[:, 0] - done.clean).max() < 1e-5
    plain, spliced = (text_loss(model, text.held, text.lead, change) for change in (None, changes_of(sae, model)))
    assert (plain - spliced).abs().max() < 1e-5


@pytest.mark.parametrize("site", [site for site in MODULES if site != "mlp_in"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_splice_is_what_plain_hooks_give(model, bare, pairs, site, direction):
    "Two dictionaries at one place in one sweep, in passes of a few rows; prompts of several lengths; BOS left as it is."
    saes = [random_sae(WIDTHS[site], site, heads=HEADS.get(site, 1), seed=seed) for seed in (0, 1)]
    made = [splice_edits(sae, model, label=str(i)) for i, sae in enumerate(saes)]
    values = {edit: function for _, some in made for edit, function in some.items()}
    done = sweep(model, pairs, [intervention for intervention, _ in made], direction, values=values, max_rows=3, progress=False)
    side = "clean" if direction == "noising" else "corrupt"
    wanted = [[difference(bare, tp, [(site, LAYER, 1, sae)], side) for sae in saes] for tp in pairs]
    np.testing.assert_allclose(done.patched[:, :, 0], wanted, atol=1e-4, rtol=1e-4)
    assert np.abs(done.patched[:, :, 0] - getattr(done, side)[:, :1]).max() > 0.1 and np.abs(np.diff(wanted, axis=1)).max() > 0.1


def test_bos_is_left_out_unless_it_is_asked_for(model, bare, pairs):
    sae, one = random_sae(128, "resid_post"), pairs[:1]
    for position, start in (("after_bos", 1), ("all", 0)):
        assert splice(model, sae, one, position, progress=False).patched[0, 0, 0] == pytest.approx(difference(bare, one[0], [("resid_post", LAYER, start, sae)]), abs=1e-4)
    tiny = after_bos(tiny_model("llama"), random_pair(1))[0]  # without a tokenizer
    assert dict(tiny.places)["after_bos"] == tuple(range(9)) and after_bos(tiny_model("llama"), tiny) == [tiny]


@pytest.mark.parametrize("site, heads", [("z", 4), ("q", 4), ("k", 1), ("neurons", 512)])
def test_all_heads_of_a_token_reach_a_function_one_behind_the_other(model, pairs, site, heads):
    "In every pass, whatever else is swept: `token head` rows are those of plain hooks, and two positions follow each other."
    seen, wanted = [], []
    edits = [Edit(site, LAYER, p, source="function") for p in ("entity", "final")]
    def look(rows):
        seen.append(rows.unflatten(0, (-1, heads)).flatten(1).clone())
        return rows
    others = [Edit(site, LAYER, "final", 0, "zero"), Edit("resid_pre", 1, "entity"), Edit("mlp_out", LAYER, "all")]
    sweep(model, pairs, [Intervention(edits), *others], values={edit: look for edit in edits}, max_rows=2, progress=False)
    for tp in pairs:
        with model.hooked([(site, LAYER, lambda act: wanted.append(act[0, [tp.entity, tp.final]].flatten(1).clone()))]): model.run(torch.tensor([tp.clean_ids]))
    seen, wanted = torch.cat(seen), torch.cat(wanted)
    assert seen.shape == wanted.shape and (seen.unflatten(0, (-1, 2))[:, None] - wanted.unflatten(0, (-1, 2))[None]).abs().amax((2, 3)).amin(1).max() < 1e-4


def test_the_error_is_kept(model, bare, pairs):
    sae = random_sae(128, "mlp_out", norm="token_norm")
    done = splice(model, sae, pairs, keep_error=True, progress=False)
    assert np.abs(done.patched[:, 0] - done.clean).max() == 0  # not even rounding
    def without(f): return torch.cat([f[..., :100] * 0, f[..., 100:]], -1)
    done = splice(model, sae, pairs, keep_error=True, transform=without, progress=False)
    def share(x): return x - (sae.encode(x)[..., :100] @ sae.W_dec[:100]) * x.norm(dim=-1, keepdim=True) / 128 ** 0.5
    np.testing.assert_allclose(done.patched[:, 0, 0], [difference(bare, tp, [("mlp_out", LAYER, 1, share)]) for tp in pairs], atol=1e-4)
    dropped = splice(model, sae, pairs, transform=without, progress=False)
    np.testing.assert_allclose(dropped.patched[:, 0, 0], [difference(bare, tp, [("mlp_out", LAYER, 1, lambda x: sae.decode(without(sae.encode(x)), x))]) for tp in pairs], atol=1e-4)
    assert np.abs(done.patched - done.clean[:, None]).max() > 0.01 and np.abs(done.patched - dropped.patched).max() > 0.01


# --- transcoders

@dataclass(frozen=True)
class TheMLP:
    "A transcoder that is the MLP itself, with the norm that follows it where there is one; of no features."
    function: object
    layer: int
    d_in: int = 32
    d_out: int = 32
    heads: int = 1
    model: str = ""
    is_transcoder: bool = True

    @property
    def reads(self): return "mlp_in", self.layer
    @property
    def writes(self): return "mlp_out", self.layer
    def to(self, device=None, dtype=None): return self
    def encode(self, x): return torch.zeros_like(x)
    def decode(self, f, x): return self.function(x)


def mlp_of(name, model, layer):
    hf = tiny_hf(name)
    block = (hf.transformer.h if name == "gpt2" else hf.model.layers)[layer]
    post = getattr(block, "post_feedforward_layernorm", lambda x: x)
    return TheMLP(torch.no_grad()(lambda x: post(block.mlp(x))), layer)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "gpt2", "olmo2"])
def test_a_transcoder_that_is_the_mlp_changes_nothing(name):
    "In a sweep of pairs of several lengths and few rows at once; alone, and together with edits before it, which change what it reads; in the first, a middle and the last layer; and in texts."
    model, pairs = tiny_model(name), [random_pair(1, 6), random_pair(2, 12), random_pair(3, 9), random_pair(4, 12)]
    ids = torch.stack([torch.arange(3, 15), torch.arange(20, 32), torch.arange(60, 72)])
    before = [Edit("attn_out", 0, "entity", source="zero"), Edit("resid_pre", 0, "entity"), Edit("z", 0, "entity", 1)]
    for layer in range(model.n_layers):
        for position in ("all", "final", ["entity", "final"]):
            intervention, values = splice_edits(mlp_of(name, model, layer), model, position)
            done = sweep(model, pairs, [intervention, *(Intervention((*intervention.edits, e)) for e in before), *before], values=values, max_rows=3, progress=False)
            assert np.abs(done.patched[:, 0] - done.clean).max() < 1e-5
            np.testing.assert_allclose(done.patched[:, 1:4], done.patched[:, 4:], atol=1e-5)
            assert (np.abs(done.patched[:, 4:, 0] - done.clean).max(0) > 1e-3).all()
        plain, spliced = (text_loss(model, ids, 1, change, positions=None, at_once=1 + layer) for change in (None, changes_of(mlp_of(name, model, layer), model)))
        assert (plain - spliced).abs().max() < 1e-5


@pytest.mark.parametrize("position", ["after_bos", "final", ["entity", "final"]])
@pytest.mark.parametrize("keep", [False, True])
def test_a_transcoder_is_what_plain_hooks_give(model, bare, pairs, position, keep):
    sae = random_sae(128, "mlp_in", writes=("mlp_out", LAYER), seed=2)
    def half(f): return f / 2
    done = splice(model, sae, pairs, position, keep_error=keep, transform=half, max_rows=2, progress=False)
    wanted = []
    for tp in pairs:
        at, there = {"after_bos": list(range(1, len(tp.clean_ids))), "final": [tp.final]}.get(str(position), [tp.entity, tp.final]), []
        def write(y):
            (x,), y = there, y.clone()
            new = half(sae.encode(x)) @ sae.W_dec + sae.b_dec
            y[:, at] = (y + new - sae(x) if keep else new)[:, at]
            return y
        wanted.append(difference(bare, tp, [("mlp_in", LAYER, 0, lambda x: there.append(x)), ("mlp_out", LAYER, 0, write)]))
    np.testing.assert_allclose(done.patched[:, 0, 0], wanted, atol=1e-4, rtol=1e-4)
    assert np.abs(done.patched[:, 0] - done.clean).max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "llama", "gpt2"])
def test_what_enters_an_mlp(name):
    "With the norm's gain it is what the bare model's MLP gets; without, tokens of norm sqrt(d), or of mean 0 and variance 1."
    model, hf, ids, seen = tiny_model(name), tiny_hf(name), torch.arange(3, 15)[None], []
    block = (hf.transformer.h if name == "gpt2" else hf.model.layers)[1]
    block.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad(): hf(ids)
    streams = {}
    with model.hooked([("resid_mid", 1, lambda act: streams.update(mid=act.clone()))]): model.run(ids)
    torch.testing.assert_close(mlp_entrance(model, ("mlp_in", 1))(streams["mid"]), seen[0], atol=1e-5, rtol=1e-5)
    x = streams["mid"]
    wanted = torch.nn.functional.layer_norm(x, (32,), eps=1e-5) if name == "gpt2" else x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(mlp_entrance(model, ("mlp_normed", 1))(x), wanted, atol=1e-4, rtol=1e-4)


def test_what_a_transcoder_reads_is_what_it_is_given(model, text):
    sae = random_sae(128, "mlp_in", writes=("mlp_out", LAYER))
    (x, y), seen = read_for(model, sae, text.held, text.lead), []
    hidden_states(model, text.held, changes_by(model, sae.reads, sae.writes, lambda a, b: seen.append((a, b)) or b))
    torch.testing.assert_close(x, seen[0][0][:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, seen[0][1][:, 1:], atol=1e-5, rtol=1e-5)


def test_half_of_a_transcoder_is_refused(model, pairs):
    intervention, values = splice_edits(random_sae(128, "mlp_in", writes=("mlp_out", LAYER)), model)
    with pytest.raises(RuntimeError, match="Apply both"): sweep(model, pairs, intervention.edits[1], values=values, progress=False)


# --- texts

@pytest.mark.parametrize("site, heads", [("resid_post", 1), ("z", 4), ("neurons", 1), ("resid_pre", 1)])
def test_the_loss_of_a_text_is_that_of_the_bare_model(model, bare, text, site, heads):
    "At the sampled positions, with nothing changed and with a dictionary at every token but BOS."
    sae = random_sae(WIDTHS[site], site, heads=heads)
    where, ids = sampled(text.held, text.lead, 5, seed=1), text.held
    assert ids.shape[0] > 2 and where.shape == (len(ids), 5) and where.min() >= 1 and where.max() <= 30 and len({tuple(row) for row in where.tolist()}) > 1
    for change, hooks in ((None, []), (changes_of(sae, model), [(site, LAYER, 1, sae)])):
        with torch.no_grad(), hooked(bare, hooks): logits = bare(ids).logits
        wanted = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        found = text_loss(model, ids, text.lead, change, positions=5, seed=1, at_once=2)
        torch.testing.assert_close(found, wanted.gather(1, where), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(text_loss(model, ids, text.lead, change, positions=None), wanted[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3-multimodal", "gpt2", "pythia"])
def test_final_hidden_states_are_those_of_the_logits(name):
    "Of every position, through whatever stands between the last block and the head."
    model, hf, ids = tiny_model(name), tiny_hf(name), torch.arange(3, 23).view(2, 10)
    with torch.no_grad(): wanted = hf(input_ids=ids).logits
    found = model.readout(hidden_states(model, ids).flatten(0, 1)).view(2, 10, -1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_change_that_gives_back_the_same_tensor_or_writes_into_it(model, text):
    "Alone in its batch, where a slice of an activation can look like another tensor than itself."
    plain = text_loss(model, text.held, text.lead)
    for n in (1, 3): assert torch.allclose(text_loss(model, text.held, text.lead, ("resid_mid", LAYER, lambda x: x), at_once=n), plain, atol=1e-5)
    sae = random_sae(128, "resid_post")
    assert torch.allclose(text_loss(model, text.held, text.lead, changes_of(sae, model, keep_error=True), at_once=1), plain, atol=1e-5)
    assert torch.equal(text_loss(model, text.held, text.lead, ("resid_post", LAYER, lambda x: x.zero_())), text_loss(model, text.held, text.lead, ("resid_post", LAYER, torch.zeros_like)))


def test_a_change_is_gone_when_its_run_is_over(model, text):
    before = text_loss(model, text.held, text.lead)
    text_loss(model, text.held, text.lead, ("resid_post", 0, torch.zeros_like))
    with pytest.raises(ZeroDivisionError): text_loss(model, text.held, text.lead, ("resid_post", 0, lambda x: 1 / 0))
    assert torch.equal(before, text_loss(model, text.held, text.lead))


# --- what does not fit

def test_what_does_not_fit_is_refused(model):
    def says(sae, match, of=model):
        with pytest.raises(DictionaryError, match=match): check_fit(sae, of)
    says(perfect(64, "resid_post", 1), "64 dimensions, and resid_post of layer 1 in bizzaro-nano has 128")
    says(perfect(128, "neurons", 1), "neurons of layer 1 in bizzaro-nano has 512")
    says(perfect(128, "resid_post", 8), "its layers are 0 to 7")
    says(perfect(128, "resid_post", -1), "no layer -1")
    says(perfect(128, "elsewhere", 1), "Unknown site 'elsewhere'")
    says(perfect(128, "pattern", 1), "as wide as the prompt")
    says(perfect(128, "z", 1), r"as 1 heads, and bizzaro-nano has 4 there.*heads=4")
    says(perfect(128, "resid_post", 1, heads=2), "has none")
    says(perfect(128, "mlp_in", 1), "It writes mlp_in")
    says(random_sae(128, "resid_post", writes=("mlp_out", 3), d_out=128), "which is there before")
    says(random_sae(128, "mlp_in", writes=("mlp_out", 3), d_out=64), "writes 64 dimensions")
    says(random_sae(32, "mlp_in", 1, writes=("mlp_out", 1)), "no resid_mid: attention and MLP read the same", tiny_model("pythia"))
    for good in (perfect(128, "z", 1, heads=4), perfect(512, "neurons", 1), perfect(512, "neurons", 1, heads=512), random_sae(128, "resid_mid", 1, writes=("mlp_out", 1))): check_fit(good, model)


def test_another_models_name_is_told(model):
    for name in ("", "bizzaro-nano", "someone/Bizzaro_Nano-it", "nano"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_fit(replace(perfect(128, "z", 1, heads=4), model=name), model)
    with pytest.warns(UserWarning, match="for google/gemma-2-2b, and the model is bizzaro-nano"): check_fit(replace(perfect(128, "resid_post", 1), model="google/gemma-2-2b"), model)


def test_a_wrong_scale_is_told_from_a_wrong_place(model):
    texts = documents("facts", 60)
    sae = replace(perfect(128, "resid_post", LAYER), kind="jumprelu", threshold=torch.full((256,), 0.5), norm="scale", scale=2.5)
    right, wrong, elsewhere = (fits(one, model, texts, 500) for one in (sae, replace(sae, scale=160.0), replace(sae, W_dec=sae.W_dec.roll(1, 0))))
    assert right.ok and "it fits" in str(right) and right.explained > 0.9
    assert not wrong.ok and wrong.scaled_wrongly and wrong.factor >= 32 and "another scale" in str(wrong) and wrong.explained < 0
    assert not elsewhere.ok and not elsewhere.scaled_wrongly and "another model, layer or site" in str(elsewhere)
    exact = fits(perfect(128, "z", LAYER, heads=4), model, texts, 500)
    assert exact.ok and exact.explained == pytest.approx(1) and exact.cosine == pytest.approx(1) and exact.n == 508
