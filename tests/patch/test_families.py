"""Every site of many architectures against an oracle: plain PyTorch hooks on the bare Hugging Face model, which knows neither
TransformerLens nor the engine, and runs one whole unpadded prompt for every intervention."""
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import cycle

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, LAYERS, LOADED, PER_HEAD, REFUSED, bare, described
from tiny import random_pair
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bizzaroworld.files import data_path
from bizzaroworld.model.hooked import SITES
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import ModelError
from bizzaroworld.patch.interventions import POSITIONS, Edit, Intervention
from bizzaroworld.patch.sweep import sweep

TOLERANCE = 1e-5  # of the largest logit
SIDES = {"noising": ("clean_ids", "corrupt_ids"), "denoising": ("corrupt_ids", "clean_ids")}
ATTENTION = ("pattern", "scores")
pytestmark = pytest.mark.slow
MASKED = -1e30  # a score below this is a mask


# -- The oracle -------------------------------------------------------------------------------------------------------

def columns(names, site: str, width: int, n: int, n_kv: int) -> torch.Tensor:
    """Which columns of a module's output (or input) each head of a site has: `head d`. One head where there are none."""
    heads = {"z": n, "q": n, "k": n_kv, "v": n_kv}.get(site, 1)
    if site not in ("q", "k", "v") or len(names.qkv) == 3: return torch.arange(width).view(heads, -1)
    part = "qkv".index(site)
    if names.layout == "q|k|v":
        d = width // (n + 2 * n_kv)
        start = (0, n * d, (n + n_kv) * d)[part]
        return torch.arange(start, start + heads * d).view(heads, d)
    if names.layout == "heads": return torch.arange(width).view(n, 3, -1)[:, part]
    if names.layout == "groups":
        groups = torch.arange(width).view(n_kv, n // n_kv + 2, -1)
        return {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[site].reshape(heads, -1)
    assert names.layout == "codegen"  # four shards, each with its queries, values and keys
    return torch.arange(width).view(4, 3, n // 4, -1)[:, (0, 2, 1)[part]].reshape(heads, -1)


class Softmax(TorchFunctionMode):
    "Shows the attention scores of the block that is being run, and the pattern made of them, to functions that may change them."

    def __init__(self):
        super().__init__()
        self.layer, self.at = None, {}

    def seen(self, site, x):
        return self.at.get((site, self.layer), lambda x: x)(x)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.layer is None: return func(*args, **kwargs)
        if func is torch.cat and [x.shape[-2:] for x in args[0]] == [(n := args[0][0].shape[-2], n), (n, 1)]:
            return func([self.seen("scores", args[0][0]), args[0][1]], **kwargs)  # a sink beside the keys (GPT-OSS)
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax) and args[0].ndim > 2:
            scores, n = args[0], args[0].shape[-2]
            if scores.shape[-1] == n: return self.seen("pattern", func(self.seen("scores", scores), *args[1:], **kwargs))
            out = func(scores, *args[1:], **kwargs)
            return torch.cat([self.seen("pattern", out[..., :n]), out[..., n:]], -1)
        return func(*args, **kwargs)


class Oracle:
    "The bare model of a family: what its sites hold, and what a prompt's logits are when some of it is replaced."

    def __init__(self, name: str):
        self.hf, self.names = bare(name), FAMILIES[name].names
        config = self.hf.config.get_text_config()
        self.n, self.n_kv = config.num_attention_heads, self.names.kv_heads
        self.blocks = self.hf.get_submodule(self.names.blocks)
        self.softmax, self.seen, self.alone = Softmax(), {}, {}

    def place(self, site: str, layer: int) -> tuple[torch.nn.Module, str]:
        "The module where a site lives, and at which end of it."
        names = self.names
        inner = {"attn_out": names.attn_out or names.attn, "mlp_out": names.mlp_out or names.mlp, "resid_mid": names.mid,
                 "z": f"{names.attn}.{names.o}", **{s: f"{names.attn}.{names.qkv[i % len(names.qkv)]}" for i, s in enumerate("qkv")}}
        end = {"resid_pre": "in", "resid_mid": names.mid_end, "z": "in"}.get(site, "out")
        block = self.blocks[layer]
        return (block.get_submodule(inner[site]) if site in inner else block), end

    @contextmanager
    def changed(self, changes):
        "While the context lasts, the values at `(site, layer)` are what the functions in `changes` make of them: `pos head d`."
        handles, self.softmax.at = [], {}

        def spread(site, act, change):
            cols = columns(self.names, site, act.shape[-1], self.n, self.n_kv)
            scale = self.names.scale if site in ("attn_out", "mlp_out") else 1
            if site != "resid_mid": act = act.clone()  # there in place: the stream goes on beside the norm that reads it
            tokens = act.view(-1, act.shape[-1])  # OPT's are flat
            tokens[:, cols] = change(tokens[:, cols] * scale) / scale
            return act

        def before(site, change):
            def hook(module, args, kwargs):
                if args: return (spread(site, args[0], change), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": spread(site, kwargs["hidden_states"], change)}
            return lambda module: module.register_forward_pre_hook(hook, with_kwargs=True)

        def after(site, change):
            def hook(module, args, out):
                return (spread(site, out[0], change), *out[1:]) if isinstance(out, tuple) else spread(site, out, change)
            return lambda module: module.register_forward_hook(hook)

        def within(layer):
            def enter(*_): self.softmax.layer = layer
            def leave(*_): self.softmax.layer = None
            attn = self.blocks[layer].get_submodule(self.names.attn)
            return [attn.register_forward_pre_hook(enter), attn.register_forward_hook(leave)]
        for (site, layer), change in changes.items():
            if site in ATTENTION:
                def seen(x, change=change):
                    heads = x.view(-1, *x.shape[-2:])
                    return change(heads.transpose(0, 1)).transpose(0, 1).reshape(x.shape)
                self.softmax.at[site, layer] = seen
                handles += within(layer)
            else:
                module, end = self.place(site, layer)
                handles.append((before if end == "in" else after)(site, change)(module))
        try:
            with self.softmax if self.softmax.at else nullcontext(): yield
        finally:
            for handle in handles: handle.remove()

    @torch.no_grad()
    def logits(self, ids, changes=None):
        for m in self.hf.modules():  # dynamic rotary frequencies remember the longest prompt so far
            if hasattr(m, "original_inv_freq") and hasattr(m, "max_seq_len_cached"):
                m.inv_freq, m.max_seq_len_cached = m.original_inv_freq.clone(), m.original_max_seq_len
        with self.changed(changes or {}): return self.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()

    def unpatched(self, ids):
        if ids not in self.alone: self.alone[ids] = self.logits(ids)
        return self.alone[ids]

    def record(self, ids, sites) -> dict:
        "What sites hold in every layer, `pos head d`."
        seen = self.seen.setdefault(ids, {})
        if {s for s, _ in seen} >= set(sites): return seen
        def keep(key):
            def change(x):
                seen[key] = x.clone()
                return x
            return change
        self.logits(ids, {(s, l): keep((s, l)) for s in sites for l in range(LAYERS)})
        return seen

    def patched(self, tp, direction, intervention, donor_tp, donor, values):
        "The logit difference of one intervention on one prompt; `donor` is the record of the prompt that the values come from."
        changes = {}
        for e in intervention.edits:
            earlier = changes.get((e.site, e.layer), lambda x: x)
            def change(x, e=e, earlier=earlier):
                x = earlier(x).clone()
                for p, there in zip(places(e.position, tp), places(e.position, donor_tp)):
                    for h in range(x.shape[1]) if e.head is None else [e.head]:
                        new = {"donor": lambda: donor[e.site, e.layer][there, h], "zero": lambda: torch.zeros_like(x[p, h]),
                               "given": lambda: of_head(values[e], e, h), "added": lambda: x[p, h] + of_head(values[e], e, h)}[e.source]()
                        if e.site == "scores": new = torch.where(x[p, h] < MASKED, x[p, h], new)  # what is masked stays so
                        x[p, h] = new
                return x
            changes[e.site, e.layer] = change
        return difference(tp, self.logits(getattr(tp, SIDES[direction][0]), changes))


def difference(tp, logits) -> float: return (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()


def of_head(value, edit, head): return value[head] if value.ndim == 2 and edit.head is None else value


def places(position, tp) -> list[int]:
    "The tokens of a position, in the oracle's own words."
    n, (first, stop) = len(tp.clean_ids), tp.entity_span
    named = {"final": [n - 1], "entity": [stop - 1], "entity_first": [first], "entity_span": list(range(first, stop)), "all": list(range(n))}
    return named[position] if isinstance(position, str) else [position % n]


# -- What is asked ----------------------------------------------------------------------------------------------------

@cache
def loaded(name): return load_model(bare(name)), Oracle(name)


ASKED = ("final", "entity", "all", 2, "entity_span", "entity_first", -2, 0)
assert {*POSITIONS} <= {*ASKED}, "a named position that the oracle does not know"


def edits_of(site: str, heads: int, turn: int, asked=ASKED, sources=("donor", "zero", "given", "added")):
    """Edits of a site in every layer, at every position (after layer 0 at half of them a turn); the sources and heads take turns.

    Not among them: zero scores (they have a test of their own), and one attention row for several positions."""
    where, source = cycle([None, *range(heads)] if heads else [None]), cycle(sources)
    for _ in range(turn): next(source)
    for layer in range(LAYERS):
        for position in asked if layer == 0 or len(asked) < 4 else asked[turn::2]:
            e = Edit(site, layer, position, next(where), next(source))
            if site == "scores" and e.source == "zero" or (
                    site in ATTENTION and e.source in ("given", "added") and position in ("all", "entity_span")):
                e = Edit(site, layer, position, e.head)
            yield e
        next(source)


def several(site: str, turn: int) -> Intervention:
    "Edits together: two of the site, and one of the stream between them."
    a, b = ("final", "entity") if turn else ("entity", "final")
    stream = Edit("resid_pre" if site != "resid_pre" else "resid_post", 1, a)
    return Intervention((Edit(site, 0, b), Edit(site, 1, b, source="donor" if site == "scores" else "zero"), stream))


def given(edit, tp, record, seed):
    "A value for an edit of source `given` or `added`, of the size of what is there."
    there = record[edit.site, edit.layer]
    own, size = there[places(edit.position, tp)[-1]], there[there > MASKED].std()
    value = size * torch.randn(own.shape, generator=torch.Generator().manual_seed(seed))
    if edit.site == "scores" and edit.source == "given": value = torch.where(own < MASKED, own, own + value)
    if edit.site not in PER_HEAD: return value[0]
    return value if edit.head is None else value[edit.head]


def compare(name, pairs, interventions, direction, donors=None):
    """The sweep against the oracle, which takes turns with the pairs.

    Returns where they differ by more than the tolerance, and the largest effect that the oracle finds for any intervention,
    both relative to the largest logit."""
    model, oracle = loaded(name)
    base, other = SIDES[direction]
    sites = {e.site for i in interventions for e in i.edits}
    donors = donors or pairs
    records = [oracle.record(getattr(tp, other), sites) for tp in donors]
    values = {e: given(e, pairs[0], records[0], i) for i, one in enumerate(interventions) for e in one.edits
              if e.source in ("given", "added")}
    ours = sweep(model, pairs, interventions, direction, values=values, donors=donors, progress=False)
    logits = [oracle.unpatched(getattr(tp, base)) for tp in pairs]
    alone, size = [difference(tp, x) for tp, x in zip(pairs, logits)], max(x.abs().max() for x in logits).item()
    bad = [f"unpatched: {g:.0e}" for g in np.abs(getattr(ours, base[:-4])[:, 0] - alone) / size if not g < TOLERANCE]
    effects = []
    for i, one in enumerate(interventions):
        b = (i + (direction == "denoising")) % len(pairs)
        theirs = oracle.patched(pairs[b], direction, one, donors[b], records[b], values)
        effects.append(abs(theirs - alone[b]) / size)
        gap = abs(ours.patched[b, i, 0] - theirs) / size
        if not gap < TOLERANCE: bad.append(f"{one} of {len(pairs[b].clean_ids)} tokens: {gap:.0e}")
    return bad, max(effects)


def told(bad, n): return f"{len(bad)} of {n} differ: {'; '.join(bad[:6])}"


# -- The tests --------------------------------------------------------------------------------------------------------

def sites_of(name): return [s for s in SITES if s not in FAMILIES[name].without]


@pytest.mark.parametrize("name", LOADED)
def test_it_announces_its_sites(name):
    """And says of each that it lacks that, and why. Those that it has are in every layer."""
    model, _ = loaded(name)
    assert list(model.sites) == sites_of(name)
    assert all((s, layer) in model.points for s in model.sites for layer in range(LAYERS))
    assert all(any(limit.startswith(f"no {s}:") for limit in model.limits) for s in FAMILIES[name].without), model.limits


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_reason(name):
    with pytest.raises(ModelError, match=FAMILIES[name].refused): load_model(bare(name))


@pytest.mark.parametrize("name, site", [(name, s) for name in LOADED for s in sites_of(name)])
def test_a_site_agrees_with_the_bare_model(name, site):
    """In every layer, at every position, from every source, in both directions; several edits at once; two pairs at once."""
    heads = loaded(name)[0].shape.heads(site)
    for turn, direction in enumerate(SIDES):
        interventions = [*map(Intervention, edits_of(site, heads, turn)), several(site, turn)]
        bad, effect = compare(name, [random_pair(1), random_pair(2)], interventions, direction)
        assert not bad, f"{direction}: {told(bad, len(interventions))}"
        assert effect > 10 * TOLERANCE, f"nothing of this changes the prediction: {effect:.0e}"


@pytest.mark.parametrize("name", LOADED)
def test_prompts_of_several_lengths_agree_with_the_bare_model(name):
    """All sites in one sweep; values of the pairs themselves, then of each other."""
    model, _ = loaded(name)
    pairs, sites = [random_pair(1, 6, (1, 3)), random_pair(2, 12, (8, 9)), random_pair(3, 9)], set(sites_of(name))
    def asked(sites, turn, positions, *sources): return [Intervention(e) for s in SITES if s in sites for e in edits_of(
        s, model.shape.heads(s), turn, positions, sources)]
    plan = [("noising", pairs, asked(sites, 0, ("final", "entity"), "donor", "zero")),
            ("denoising", pairs, asked(sites - {*ATTENTION}, 1, ("all", 2), "donor", "zero", "given", "added")),
            ("noising", pairs[1:] + pairs[:1], asked(sites - {*ATTENTION}, 0, ("entity", -1), "donor"))]
    if model.length_matters:
        with pytest.raises(ValueError, match="depends on the length"): sweep(model, pairs, plan[2][2], donors=plan[2][1], progress=False)
        plan.pop()
    for direction, donors, interventions in plan:
        bad, _ = compare(name, pairs, interventions, direction, donors)
        assert not bad, f"{direction}: {told(bad, len(interventions))}"


@pytest.mark.parametrize("name", LOADED)
def test_any_number_of_rows_agrees_with_the_bare_model(name):
    """As many as the model has heads, or the prompt tokens, so that the axes could be taken for each other."""
    edits = [Edit("resid_pre", layer, position) for position in range(1, 6) for layer in range(LAYERS)]
    tp = random_pair(4, 9, (1, 6))
    for n in range(1, len(edits) + 1):
        bad, _ = compare(name, [tp], [*map(Intervention, edits[:n])], "noising")
        assert not bad, f"{n} rows and the base run: {told(bad, n)}"


@pytest.mark.parametrize("name", [name for name in LOADED if "scores" in sites_of(name)])
def test_zero_scores_leave_the_mask(name):
    """Where a query may look it looks everywhere alike, and nowhere else."""
    interventions = [Intervention(Edit("scores", layer, p, head, "zero")) for layer in range(LAYERS)
                     for p, head in (("entity", None), ("final", 1))]
    bad, _ = compare(name, [random_pair(1), random_pair(2)], interventions, "noising")
    assert not bad, told(bad, len(interventions))


def test_the_table_of_the_site_is_what_these_families_are():
    """Made by `python tests/families.py`. Every family with sites in the table is one whose sites are compared above."""
    found = pd.DataFrame([described(name) for name in FAMILIES])
    pd.testing.assert_frame_equal(found, pd.read_csv(data_path("architectures", "families.csv"), keep_default_na=False))
    assert set(found.family[found.sites > 0]) == set(LOADED) and found[found.sites > 0]["class"].nunique() > 60, "as the README says"
