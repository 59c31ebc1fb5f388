"""Tiny GGUF files, written as llama.cpp's converter writes them: its names, its permutation of queries and keys, its norms."""
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny import LAYERS
from transformers import (Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = list(bytes_to_unicode().values())
MERGES = ["t h", "Ġ o", "Ġo f", "th e"]
BPE = [*BYTES, *(m.replace(" ", "") for m in MERGES), "<|endoftext|>", "<|im_end|>"]
LETTERS = [chr(c) for c in range(33, 127)] + ["▁", "É", "\n"]
SPM = ["<pad>", "</s>", "<s>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), *LETTERS, "▁o", "▁of", "th", "the"]
GEMMA = ["<pad>", "<eos>", "<bos>", *SPM[3:]]
_WIDTH = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=64)
_HEADS = dict(head_dim=8, num_key_value_heads=2, vocab_size=len(SPM), bos_token_id=2, eos_token_id=1, pad_token_id=0, **_WIDTH)
_QWEN = _HEADS | dict(vocab_size=len(BPE), bos_token_id=260, eos_token_id=261, pad_token_id=260)
_LOCAL = dict(query_pre_attn_scalar=8, sliding_window=4, rms_norm_eps=1e-5)
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e4}, **_HEADS)),
    "llama31": lambda: LlamaForCausalLM(LlamaConfig(rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}, **_HEADS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **_HEADS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **{k: v for k, v in _QWEN.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_QWEN)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(attn_logit_softcapping=20.0, final_logit_softcapping=15.0, **_LOCAL, **_HEADS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_LOCAL, **_HEADS | {"num_hidden_layers": 7})),
    "gemma3-long": lambda: Gemma3ForCausalLM(Gemma3TextConfig(rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, **_LOCAL, **_HEADS | {"num_hidden_layers": 7})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(BPE), n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64,
                                               bos_token_id=260, eos_token_id=260)),
}
ARCHITECTURES = {"llama31": "llama", "mistral": "llama", "gemma3-long": "gemma3"}  # where it is not the name itself


def tiny_for_gguf(name: str):
    """A random model whose norms are not one and whose biases are not zero, so that a wrong conversion shows."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    return model


def _converted(hf_name: str, weight: np.ndarray, architecture: str, config) -> np.ndarray:
    """A weight as llama.cpp keeps it."""
    if architecture == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
        n = config.num_attention_heads if "q_proj" in hf_name else config.num_key_value_heads
        return weight.reshape(n, 2, weight.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    if architecture.startswith("gemma") and hf_name.endswith("norm.weight"): return weight + 1
    if architecture == "gpt2" and weight.ndim == 2 and any(part in hf_name for part in ("c_attn", "c_proj", "c_fc")): return weight.T
    return weight


def _vocabulary(writer: gguf.GGUFWriter, architecture: str) -> None:
    """The tokenizer, byte pairs or SentencePiece, as the family has it."""
    if architecture in ("gpt2", "qwen2", "qwen3"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2" if architecture == "gpt2" else "qwen2")
        writer.add_token_list(BPE)
        writer.add_token_types([1] * (len(BPE) - 2) + [3, 3])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(260)
        writer.add_eos_token_id(260 if architecture == "gpt2" else 261)
        if architecture != "gpt2": writer.add_add_bos_token(False)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(GEMMA if architecture.startswith("gemma") else SPM)
        writer.add_token_scores([-1000.0] * 261 + [-float(i) for i in range(len(LETTERS))] + [-0.5, -0.1, -0.3, -0.2])
        writer.add_token_types([3, 3, 3, 2, 3] + [6] * 256 + [1] * (len(SPM) - 261))
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        writer.add_add_bos_token(True)


def _facts(writer: gguf.GGUFWriter, architecture: str, config) -> None:
    """The configuration, under llama.cpp's keys."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2": return writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "llama": writer.add_rope_dimension_count(config.head_dim)
    if architecture in ("qwen3", "gemma2", "gemma3"): writer.add_key_length(config.head_dim)
    if architecture.startswith("gemma"): writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_gguf(path: Path, name: str, hf_model=None, quantize: bool = False, leave_out: str = "-", more: dict | None = None) -> Path:
    """Write the model `name` (or one like it) to a GGUF file; `quantize`: its matrices in Q8_0; `more`: tensors to add."""
    hf_model = hf_model or tiny_for_gguf(name)
    architecture, config = ARCHITECTURES.get(name, name), hf_model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(7 if quantize else 0)
    writer.add_name(f"Tiny {name}")
    _facts(writer, architecture, config)
    _vocabulary(writer, architecture)
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names, tied = gguf.get_tensor_name_map(kind, config.num_hidden_layers), config.tie_word_embeddings
    for hf_name, tensor in hf_model.state_dict().items():
        if tied and hf_name == "lm_head.weight" or leave_out in hf_name: continue
        weight = np.ascontiguousarray(_converted(hf_name, tensor.numpy(), architecture, config))
        file_name = names.get_name(hf_name, (".weight", ".bias"))
        assert file_name, hf_name
        if quantize and weight.ndim == 2:
            writer.add_tensor(file_name, gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else: writer.add_tensor(file_name, weight)
    for file_name, weight in (more or {}).items(): writer.add_tensor(file_name, weight)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        bare = 1 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (bare / hf_model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
