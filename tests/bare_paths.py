"""Path patching with plain PyTorch hooks on a bare Hugging Face model: whole prompts, one path at a time, no TransformerLens."""
from contextlib import ExitStack

import torch

LLAMA = dict(blocks="model.layers", norm="model.norm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
             mid="post_attention_layernorm", mlp="mlp")
GEMMA2 = LLAMA | dict(mid="pre_feedforward_layernorm", mlp="post_feedforward_layernorm")
GPT2 = dict(blocks="transformer.h", norm="transformer.ln_f", qkv="attn.c_attn", o="attn.c_proj", mid="ln_2", mlp="mlp")
NAMES = {"llama": LLAMA, "gemma": LLAMA, "gemma-mha": LLAMA, "qwen3": LLAMA, "mistral": LLAMA, "gemma2": GEMMA2, "gemma3": GEMMA2, "gpt2": GPT2}


class Bare:
    """A bare model whose places can be recorded and replaced: `in` (a block's input), `q`, `k`, `v`, `z` (`pos head d_head`), `mid` (what the MLP's norm
    reads), `mlp` (what is added to the stream), and `end` (what the last norm reads)."""

    def __init__(self, hf, name):
        self.hf, self.names = hf.eval(), NAMES[name]
        self.hf.set_attn_implementation("eager")
        config = hf.config
        self.n, self.n_kv = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.blocks = hf.get_submodule(self.names["blocks"])

    def places(self):
        for l, block in enumerate(self.blocks):
            yield ("in", l), block, True, None
            for s in "qkv":
                if s in self.names: yield (s, l), block.get_submodule(self.names[s]), False, self.n if s == "q" else self.n_kv
            if "qkv" in self.names: yield ("qkv", l), block.get_submodule(self.names["qkv"]), False, 3 * self.n
            yield ("z", l), block.get_submodule(self.names["o"]), True, self.n
            yield ("mid", l), block.get_submodule(self.names["mid"]), True, None
            yield ("mlp", l), block.get_submodule(self.names["mlp"]), False, None
        yield ("end", 0), self.hf.get_submodule(self.names["norm"]), True, None

    @torch.no_grad()
    def run(self, ids, changes=None):
        "Logits of the next token, and what was at every place, after the functions in `changes` (new tensors, not in place)."
        seen = {}
        def touch(key, act, heads):
            x = act[0] if heads is None else act[0].view(len(act[0]), heads, -1)
            if key[0] == "qkv":
                for i, s in enumerate("qkv"):
                    part = slice(i * self.n, (i + 1) * self.n)
                    if (s, key[1]) in (changes or {}): x = torch.cat([x[:, :part.start], changes[s, key[1]](x[:, part]), x[:, part.stop:]], 1)
                    seen[s, key[1]] = x[:, part].clone()
            elif key in (changes or {}): x = changes[key](x.clone())
            seen[key] = x.clone()
            return x.reshape(act.shape)
        def before(key, heads):
            def hook(module, args, kwargs):
                if args: return (touch(key, args[0], heads), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": touch(key, kwargs["hidden_states"], heads)}
            return hook
        def after(key, heads): return lambda module, args, out: touch(key, out, heads)
        with ExitStack() as stack:
            for key, module, first, heads in self.places():
                handle = (module.register_forward_pre_hook(before(key, heads), with_kwargs=True) if first
                          else module.register_forward_hook(after(key, heads)))
                stack.callback(handle.remove)
            return self.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float(), seen


class BarePaths(Bare):
    "Path patching by hand: of one pair of prompts. `beside`: site (z, mlp), layer, positions and head of what is patched in the base run already, whatever else happens."
    def __init__(self, hf, name, base, donor, beside=()):
        super().__init__(hf, name)
        self.base, self.beside = base, ()
        _, self.donor = self.run(donor)
        self.beside = beside
        _, self.clean = self.run(base)

    def run(self, ids, changes=None):
        changes = dict(changes or {})
        for site, layer, at, head in self.beside:
            def change(x, first=changes.get((site, layer)), key=(site, layer), where=(at,) if head is None else (at, head)):
                x = x if first is None else first(x).clone()
                x[where] = self.donor[key][where]
                return x
            changes[site, layer] = change
        return super().run(ids, changes)

    def put(self, site, layer, new, head=None):
        "The run in which a place, or one head of it, is replaced."
        def change(x):
            if head is None: return new
            x = x.clone()
            x[:, head] = new
            return x
        return self.run(self.base, {(site, layer): change})

    def stream(self, seen, layer, mid):
        "What is read after a component has written."
        if mid: return seen["mid", layer]
        return seen["in", layer + 1] if layer + 1 < len(self.blocks) else seen["end", 0]

    def written(self, node, value):
        "What the stream changes by if a component's output is `value`: of a head its z, of an MLP what it adds."
        site, head = ("mlp", None) if node.kind == "mlp" else ("z", node.head)
        if node.shared: site = node.kind
        if node.kind == "q": site = "q"
        _, seen = self.put(site, node.layer, value, head)
        mid = node.kind != "mlp"
        return self.stream(seen, node.layer, mid) - self.stream(self.clean, node.layer, mid)

    def received(self, node, delta):
        "What a receiver makes of the stream with `delta` on top: q; k or v of a key-value head; z where only one head reads it; what an MLP adds."
        if node.kind == "mlp":
            _, seen = self.put("mid", node.layer, self.clean["mid", node.layer] + delta)
            return seen["mlp", node.layer]
        _, changed = self.put("in", node.layer, self.clean["in", node.layer] + delta)
        if node.kind == "q" or node.shared: return changed[node.kind, node.layer][:, node.head]
        sites = "qkv" if node.kind == "head" else node.kind
        _, seen = self.run(self.base, {(s, node.layer): lambda x, s=s: changed[s, node.layer] for s in sites})
        return seen["z", node.layer][:, node.head]

    def sent(self, node):
        if node.kind == "embed": return self.donor["in", 0] - self.clean["in", 0]
        value = self.donor["mlp", node.layer] if node.kind == "mlp" else self.donor["z", node.layer][:, node.head]
        return self.written(node, value)

    def logits(self, path):
        "The logits with the change of a path."
        delta = self.sent(path[0])
        for node in path[1:]:
            if node.kind == "logits": return self.put("end", 0, self.clean["end", 0] + delta)[0]
            value = self.received(node, delta)
            if node is not path[-1]: delta = self.written(node, value)
        site = "mlp" if node.kind == "mlp" else node.kind if node.kind == "q" or node.shared else "z"
        return self.put(site, node.layer, value, None if node.kind == "mlp" else node.head)[0]
