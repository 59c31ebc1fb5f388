"""Brute force on the bare Hugging Face model: what heads and MLPs write, read in one run and put, wholly or in part, into another."""
from contextlib import contextmanager

import torch


def blocks(hf):
    decoder = hf.transformer if hasattr(hf, "transformer") else hf.model
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def out_projection(block): return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def end_of_mlp(block): return block.post_feedforward_layernorm if hasattr(block, "post_feedforward_layernorm") else block.mlp


def end_of_attention(block):
    if hasattr(block, "attn"): return block.attn
    return block.post_attention_layernorm if hasattr(block, "post_feedforward_layernorm") else block.self_attn


@contextmanager
def written(hf, write):
    """While the context lasts, `write(site, layer, act)` says what stands at z, attn_out, mlp_out (layer by layer) and at the first block's input."""
    handles = [blocks(hf)[0].register_forward_pre_hook(lambda m, args, kwargs: ((write("resid_pre", 0, args[0]), *args[1:]), kwargs) if args
               else (args, kwargs | {"hidden_states": write("resid_pre", 0, kwargs["hidden_states"])}), with_kwargs=True)]
    for l, block in enumerate(blocks(hf)):
        def attention(m, args, out, l=l): return (write("attn_out", l, out[0]), *out[1:]) if isinstance(out, tuple) else write("attn_out", l, out)
        handles += [out_projection(block).register_forward_pre_hook(lambda m, args, l=l: (write("z", l, args[0]),)),
                    end_of_attention(block).register_forward_hook(attention),
                    end_of_mlp(block).register_forward_hook(lambda m, args, out, l=l: write("mlp_out", l, out))]
    try: yield
    finally:
        for handle in handles: handle.remove()


def seen(hf, ids):
    """What stands at every site, and the logits at the last token."""
    acts = {}
    def look(site, layer, act):
        acts[site, layer] = act.detach().clone()
        return act
    with torch.no_grad(), written(hf, look): return acts, hf(torch.tensor([ids])).logits[0, -1]


def at_edit(hf, e, position):
    """The part of an activation that an edit means, at one token."""
    size = getattr(hf.config, "head_dim", None) or hf.config.hidden_size // hf.config.num_attention_heads
    return (0, position, slice(None) if e.head is None else slice(e.head * size, (e.head + 1) * size))


def logits_with(hf, ids, puts):
    """Logits at the last token with `(edit, position, act, share)`: a share of another run's activation at a token in place of what is there."""
    def write(site, layer, act):
        here = [p for p in puts if (p[0].site, p[0].layer) == (site, layer)]
        if not here: return act
        new = act.clone()
        for e, position, other, share in here:
            where = at_edit(hf, e, position)
            new[where] = (1 - share) * act[where] + share * other[where]
        return new
    with written(hf, write): return hf(torch.tensor([ids])).logits[0, -1]
