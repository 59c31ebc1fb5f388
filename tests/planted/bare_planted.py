"""Brute force on the bare Hugging Face model: what each edge is worth, and what a gradient says about each node."""
from contextlib import contextmanager

import torch

from bizzaroworld.patch.interventions import positions_of
from bizzaroworld.planted.weights import D_HEAD

MODULES = {"z": ("self_attn", "o_proj"), "q": ("self_attn", "q_proj"), "k": ("self_attn", "k_proj"), "v": ("self_attn", "v_proj"),
           "mlp_out": ("mlp", None)}


def before_mlp(layer):
    """The norm before the MLP: a Llama calls it by the name of what in a Gemma stands behind attention."""
    return getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)


def out_of_attention(layer, z):
    out = layer.self_attn.o_proj(z)
    return layer.post_attention_layernorm(out) if hasattr(layer, "pre_feedforward_layernorm") else out


def out_of_mlp(layer, stream):
    out = layer.mlp(before_mlp(layer)(stream))
    return layer.post_feedforward_layernorm(out) if hasattr(layer, "post_feedforward_layernorm") else out


def readout(hf, stream):
    logits, cap = hf.lm_head(hf.model.norm(stream)), getattr(hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def bare(planted):
    """The model of a variant, built again: no hooks, no TransformerLens."""
    return planted.build().requires_grad_(False)


def module(hf, site, layer):
    if site == "mlp_out" and hasattr(hf.model.layers[layer], "post_feedforward_layernorm"): return hf.model.layers[layer].post_feedforward_layernorm
    part, inner = MODULES[site]
    found = getattr(hf.model.layers[layer], part)
    return found if inner is None else getattr(found, inner)


@contextmanager
def hooks(handles):
    try: yield
    finally:
        for handle in handles: handle.remove()


def seen(hf, ids, sites=("z", "q", "k", "v", "mlp_out"), with_grad=False):
    """Logits, and the activation of every site and layer; and the stream before attention, before the MLP and at the end."""
    acts, handles = {}, []
    def keep(key, inputs=False):
        def hook(_, args, out=None):
            act = args[0] if inputs else out
            if with_grad:
                act = act if act.requires_grad else act.detach().requires_grad_()
                act.retain_grad()
                acts[key] = act
                return (act,) if inputs else act
            acts[key] = act.detach()
        return hook
    for l, layer in enumerate(hf.model.layers):
        for site in sites:
            m = module(hf, site, l)
            handles.append(m.register_forward_pre_hook(keep((site, l), True)) if site == "z" else m.register_forward_hook(keep((site, l))))
        if not with_grad:
            handles.append(layer.input_layernorm.register_forward_pre_hook(keep(("pre", l), True)))
            handles.append(before_mlp(layer).register_forward_pre_hook(keep(("mid", l), True)))
    if not with_grad: handles.append(hf.model.norm.register_forward_pre_hook(keep(("pre", len(hf.model.layers)), True)))
    with hooks(handles): return hf(input_ids=ids).logits, acts


def ids_of(tp): return torch.tensor([tp.clean_ids]), torch.tensor([tp.corrupt_ids])
def ld(logits, tp): return logits[..., -1, tp.clean_target_id] - logits[..., -1, tp.corrupt_target_id]
def at(n, tp): return positions_of(n.position, tp)[0]
def heads(n): return slice(n.head * D_HEAD, (n.head + 1) * D_HEAD)


@torch.no_grad()
def edge_effects(planted, edges, tp, beside=None):
    """What one edge alone changes: the receiver reads what the sender writes in the other run, everybody else what they read anyway, and what comes
    after the receiver is computed. As a share of the distance of the two runs; noising. `beside`: a head or MLP that writes what it writes in the other run
    all the time; changes are counted from the run with that alone."""
    hf, (clean, corrupt) = bare(planted), ids_of(tp)
    donor_logits, donor = seen(hf, corrupt)
    whole = ld(hf(input_ids=clean).logits, tp)
    def keep(_, args, out=None):
        act, where = (args[0] if out is None else out).clone(), slice(None) if beside.head is None else heads(beside)
        act[:, at(beside, tp), where] = donor[beside.site, beside.layer][0, at(beside, tp), where]
        return (act,) if out is None else act
    def held():
        if beside is None: return []
        m = module(hf, beside.site, beside.layer)
        return [m.register_forward_pre_hook(keep) if beside.site == "z" else m.register_forward_hook(keep)]
    with hooks(held()): base_logits, base = seen(hf, clean)

    def change(n):
        i = at(n, tp)
        if n.site == "embed": return donor["pre", 0][0, i] - base["pre", 0][0, i]
        if n.site == "mlp_out": return donor["mlp_out", n.layer][0, i] - base["mlp_out", n.layer][0, i]
        layer, z = hf.model.layers[n.layer], base["z", n.layer][0, i].clone()
        z[heads(n)] = donor["z", n.layer][0, i, heads(n)]  # a norm behind attention sees the other heads, too
        return out_of_attention(layer, z) - out_of_attention(layer, base["z", n.layer][0, i])

    put, end = {}, base_logits[0, -1].repeat(len(edges), 1)
    for row, edge in enumerate(edges):
        s, r = edge.sender, edge.receiver
        i, delta = at(r, tp), change(s)
        layer = hf.model.layers[r.layer] if r.layer < len(hf.model.layers) else None
        if r.site == "logits": end[row] = readout(hf, base["pre", r.layer][0, i] + delta)
        elif r.site == "mlp_in":
            put.setdefault(("mlp_out", r.layer), []).append((row, i, slice(None), out_of_mlp(layer, base["mid", r.layer][0, i] + delta)))
        else:
            new = module(hf, r.site, r.layer)(layer.input_layernorm(base["pre", r.layer][0, i] + delta))[heads(r)]
            put.setdefault((r.site, r.layer), []).append((row, i, heads(r), new))

    def writer(writes):
        def hook(_, args, out):
            for row, i, where, value in writes: out[row, i, where] = value
            return out
        return hook
    with hooks([*(module(hf, *key).register_forward_hook(writer(writes)) for key, writes in put.items()), *held()]):
        out = hf(input_ids=clean.repeat(len(edges), 1)).logits[:, -1:]
    for row, edge in enumerate(edges):
        if edge.receiver.site == "logits": out[row, 0] = end[row]
    start, goal = ld(base_logits, tp), ld(donor_logits, tp)
    return ((ld(out, tp) - start) / (whole - goal).abs()).tolist()


def gradients(planted, nodes, tp, stop=()):
    """(donor - base) . gradient at the clean run for every node, as a share of the distance of the two runs. `stop`: layers whose MLP passes no gradient."""
    hf, (clean, corrupt) = bare(planted), ids_of(tp)
    _, donor = seen(hf, corrupt)
    with hooks([module(hf, "mlp_out", l).register_forward_hook(lambda _, args, out: out.detach()) for l in stop]):
        logits, base = seen(hf, clean, with_grad=True)
        start = ld(logits, tp)
        start.sum().backward()
    distance = (start - ld(hf(input_ids=corrupt).logits, tp)).abs().item()
    def estimate(n):
        key, i = (n.site, n.layer), at(n, tp)
        where = slice(None) if n.head is None else heads(n)
        return ((donor[key] - base[key].detach())[0, i, where] @ base[key].grad[0, i, where]).item() / distance
    return {n: estimate(n) for n in nodes}
