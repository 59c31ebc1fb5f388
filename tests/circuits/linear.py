"""A random model that is linear in its embeddings: linear MLPs, attention that looks everywhere alike, norms that only subtract the mean."""
import torch
from tiny import LAYERS, VOCAB
from transformers import GPT2Config, GPT2LMHeadModel


def linear_hf(activation: str = "linear", attention: float = 0.0, seed: int = 0):
    """Or with another activation, and attention that looks where it looks."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, activation_function=activation,
                                       layer_norm_epsilon=1e12)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.15)
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= attention
            block.attn.c_attn.bias[:64] *= attention
        for name, p in model.named_parameters():
            if "ln_" in name and name.endswith("weight"): p.fill_(1e6)  # the root of an epsilon beside which the variance is nothing
    return model
