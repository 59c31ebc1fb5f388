"""The nnsight contestant: `make bench` runs this file in an environment of its own, .venv-nnsight.

It imports nothing of bizzaroworld. It loads a model folder, then answers requests, one line of JSON each: the ids of
both prompts, the two target ids, and edits as [site, layer, position, head]. For each it patches as nnsight's
documentation shows it: the corrupted run is traced once and the activations that are needed are saved; then one trace
holds many invokes of the clean prompt, each of which overwrites one activation. All invokes of a trace run as one batch.
"""
import json
import sys

import torch
from nnsight import TransformersModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

INVOKES = 256  # in one trace; fewer, larger traces are faster until memory is the limit
LOGITS = 2**29  # numbers in the logits of one trace: a vocabulary of 262,144 leaves room for fewer invokes


def load(folder: str) -> TransformersModel:
    """The model; prompts come as token ids, so its tokenizer only has to know a padding token."""
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), task="text-generation",
                             tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))


def activation(model, site: str, layer: int):
    """The activation of a site of a Gemma; inside a trace only. Gemma 3 has a norm behind each sublayer."""
    block = model.model.layers[layer]
    if site == "resid_pre": return block.input
    if site == "z": return block.self_attn.o_proj.input
    if model.config.model_type == "gemma3_text":
        if site == "attn_out": return block.post_attention_layernorm.output
        if site == "resid_mid": return block.pre_feedforward_layernorm.input
        if site == "mlp_out": return block.post_feedforward_layernorm.output
    if site == "attn_out": return block.self_attn.output[0]
    if site == "resid_mid": return block.post_attention_layernorm.input
    if site == "mlp_out": return block.mlp.output
    return block.output  # resid_post


ORDER = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")  # in which a block computes them


def part(model, position: int, head: int | None) -> tuple:
    """Where in an activation an edit lies; heads lie side by side in what enters the output projection."""
    if head is None: return (0, position)
    size = model.model.layers[0].self_attn.head_dim
    return (0, position, slice(head * size, (head + 1) * size))


@torch.no_grad()
def patch(model, clean: list[int], corrupt: list[int], targets: list[int], edits: list[list]) -> list[float]:
    """The logit difference under each edit."""
    ids, (right, wrong) = torch.tensor([clean]), targets
    wanted = sorted({(layer, ORDER.index(site)) for site, layer, _, _ in edits})
    with model.trace(torch.tensor([corrupt])):
        donors = {}.save()
        for layer, index in wanted: donors[ORDER[index], layer] = activation(model, ORDER[index], layer).clone()
    out, at_once = [], max(1, min(INVOKES, LOGITS // (len(clean) * model.config.vocab_size)))
    for first in range(0, len(edits), at_once):
        with model.trace() as tracer:
            values = [].save()
            for site, layer, position, head in edits[first:first + at_once]:
                with tracer.invoke(ids):
                    where = part(model, position, head)
                    activation(model, site, layer)[where] = donors[site, layer][where]
                    logits = model.lm_head.output[0, -1]
                    values.append((logits[right] - logits[wrong]).item())
        out += values
    return out


def main() -> None:
    model = load(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin: print(json.dumps(patch(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
