"""Tiny random models of real architectures, and random aligned pairs for them."""
import torch
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig,
    GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
    LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
    SiglipVisionConfig)

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.model.load import load_model

VOCAB, LAYERS = 97, 3
_WIDTH = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
              max_position_embeddings=64)
_HEADS = dict(head_dim=8, **_WIDTH)
# The sliding windows are shorter than the prompts, so that a cache which forgets would be noticed.
BUILDERS = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, **_HEADS)),
    "gemma-mha": lambda: GemmaForCausalLM(GemmaConfig(num_key_value_heads=4, **_HEADS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, sliding_window=4, query_pre_attn_scalar=8,
                                                     **_HEADS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        num_key_value_heads=2, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_HEADS)),
    # google/gemma-3-12b-it and its like are this class: a text model inside one that also sees pictures.
    "gemma3-multimodal": lambda: Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=Gemma3TextConfig(num_key_value_heads=2, sliding_window=4, query_pre_attn_scalar=8,
                                     layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                     **_HEADS | {"vocab_size": VOCAB + 10}),
        vision_config=SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, image_size=28, patch_size=14),
        mm_tokens_per_image=4, image_token_index=VOCAB + 1, boi_token_index=VOCAB + 2, eoi_token_index=VOCAB + 3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **_HEADS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=4, **_HEADS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, **_HEADS)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(num_key_value_heads=2, **_WIDTH)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64)),
    "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
                                                       num_hidden_layers=LAYERS, num_attention_heads=4)),
}


def tiny_hf(name: str, seed: int = 0):
    """A random Hugging Face model whose weights are large enough for patches to matter."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    return model


def tiny_model(name: str, seed: int = 0):
    return load_model(tiny_hf(name, seed))


def random_pair(seed: int, length: int = 9, entity: tuple[int, int] = (3, 5)) -> TokenPair:
    """A pair of random prompts that differ in the tokens of the entity."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (length,), generator=g).tolist()
    corrupt = list(clean)
    for i in range(*entity): corrupt[i] = 3 + (clean[i] + 7 + seed) % (VOCAB - 3)
    text = PromptPair("a b", "a c", " d", " e", "b", "c", f"pair-{seed}", "random")
    return TokenPair(text, tuple(clean), tuple(corrupt), 7, 11, entity)
