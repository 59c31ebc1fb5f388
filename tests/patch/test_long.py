"""Prompts of two thousand tokens, early and late entities, in little memory: the numbers of whole prompts run one at a time on the bare model."""
import numpy as np
import pytest
import torch
from tiny import VOCAB, random_pair
from transformers import LlamaConfig, LlamaForCausalLM

from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

LENGTH, LAYERS = 2000, 2


@pytest.fixture(scope="module")
def bare():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("entity", [(5, 7), (1990, 1992)])
def test_long_prompts_in_little_memory(bare, entity):
    pair = random_pair(1, LENGTH, entity)
    run = bare.model.layers
    def ld(ids, layer=None, value=None):
        def put(_, args): return (torch.cat([args[0][:, :entity[1] - 1], value, args[0][:, entity[1]:]], 1), *args[1:])
        handle = run[layer].register_forward_pre_hook(put) if layer is not None else None
        try: logits = bare(torch.tensor([ids])).logits[0, -1]
        finally: handle and handle.remove()
        return float(logits[pair.clean_target_id] - logits[pair.corrupt_target_id])
    wanted = []
    for layer in range(LAYERS):
        kept = []
        handle = run[layer].register_forward_pre_hook(lambda _, args: kept.append(args[0][:, [entity[1] - 1]].clone()))
        ld(pair.corrupt_ids)
        handle.remove()
        wanted.append(ld(pair.clean_ids, layer, kept[0]))
    model = load_model(bare)
    try:
        done = sweep(model, pair, [Intervention(Edit("resid_pre", layer, "entity")) for layer in range(LAYERS)] + [Intervention(Edit("z", 0, "entity", head)) for head in range(4)],
                     memory=2 ** 27, progress=False)
    finally: model.close()
    np.testing.assert_allclose(done.patched[0, :LAYERS, 0], wanted, atol=1e-4)
    assert len(np.unique(done.patched.round(6))) > 4, "heads of the first layer matter, each another way"
