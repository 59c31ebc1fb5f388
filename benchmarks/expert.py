"""The loop that an expert writes: 32 patched copies of a prompt in one forward of the bare Hugging Face model, with
plain PyTorch hooks and the two logits of the final position. No line of it is bizzaroworld's or TransformerLens's.
"""
from collections import defaultdict
from contextlib import ExitStack

import torch

SIZE = 32  # patched copies in a forward


def blocks_of(hf_model):
    return hf_model.transformer.h if hasattr(hf_model, "transformer") else hf_model.model.layers


def place(block, site: str) -> tuple[torch.nn.Module, str]:
    """The module of a block where a site can be read and written, and whether as its input or its output."""
    attn, after = (block.attn, block.ln_2) if hasattr(block, "attn") else (block.self_attn, block.post_attention_layernorm)
    normed = hasattr(block, "pre_feedforward_layernorm")  # a norm behind each sublayer, as Gemma 2 and 3 have
    return {"resid_pre": (block, "in"), "resid_post": (block, "out"),
            "z": (attn.o_proj if hasattr(attn, "o_proj") else attn.c_proj, "in"),
            "attn_out": (after if normed else attn, "out"),
            "resid_mid": (block.pre_feedforward_layernorm if normed else after, "in"),
            "mlp_out": (block.post_feedforward_layernorm if normed else block.mlp, "out")}[site]


def hooked(hf_model, functions: dict) -> ExitStack:
    """Hooks that hand the activation of each `(site, layer)` to a function, which may change it in place."""
    stack = ExitStack()
    for (site, layer), function in functions.items():
        module, side = place(blocks_of(hf_model)[layer], site)
        def before(module, args, kwargs, function=function): function(args[0] if args else kwargs["hidden_states"])
        def behind(module, args, out, function=function): function(out[0] if isinstance(out, tuple) else out)
        handle = module.register_forward_pre_hook(before, with_kwargs=True) if side == "in" else module.register_forward_hook(behind)
        stack.callback(handle.remove)
    return stack


def part(act, row: int, position: int, head: int | None, n_heads: int) -> tuple:
    """Where one activation vector lies; heads lie side by side in what enters the output projection."""
    if head is None: return row, position
    size = act.shape[-1] // n_heads
    return row, position, slice(head * size, (head + 1) * size)


@torch.no_grad()
def patch(hf_model, clean, corrupt, targets, edits) -> list[float]:
    """The logit difference under each edit: `(site, layer, position, head)`."""
    n_heads, device = hf_model.config.num_attention_heads, hf_model.device
    donors, out = {}, []
    def keep(key): return lambda act: donors.update({key: act.clone()})
    with hooked(hf_model, {e[:2]: keep(e[:2]) for e in edits}):
        hf_model.base_model(torch.tensor([corrupt], device=device), use_cache=False)
    weight = hf_model.get_output_embeddings().weight[list(targets)]
    for start in range(0, len(edits), SIZE):
        some, at = edits[start:start + SIZE], defaultdict(list)
        for row, (site, layer, position, head) in enumerate(some): at[site, layer].append((row, position, head))
        def put(key, rows):
            def function(act):
                for row, position, head in rows: act[part(act, row, position, head, n_heads)] = donors[key][part(act, 0, position, head, n_heads)]
            return function
        with hooked(hf_model, {key: put(key, rows) for key, rows in at.items()}):
            hidden = hf_model.base_model(torch.tensor([clean] * len(some), device=device), use_cache=False).last_hidden_state[:, -1]
        logits = hidden.float() @ weight.float().T
        out += (logits[:, 0] - logits[:, 1]).tolist()
    return out
