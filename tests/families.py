"""Tiny random models of many architectures, from their Hugging Face configuration classes, and what is expected of each:
it loads and every site agrees with the oracle; it loads without some sites; or it is refused with a `ModelError`."""
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tiny import BUILDERS
from transformers import (
    CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Mistral3Config, Mistral3ForConditionalGeneration,
    MistralConfig, PixtralVisionConfig)

VOCAB, LAYERS = 97, 2
PER_HEAD = ("z", "q", "k", "v", "pattern", "scores")


@dataclass(frozen=True)
class Names:
    """Where a bare model has the sites: paths of modules, from the block on.

    `qkv`: three modules, or one whose output holds all three, laid out as `layout` says. `attn_out` and `mlp_out`: what is added
    to the residual stream, if not what `attn` and `mlp` return. `mid`: reads the stream between attention and MLP. `scale`: what attention and MLP return is multiplied by on its way into the stream."""
    blocks: str = "model.layers"
    attn: str = "self_attn"
    mlp: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    layout: str = "q|k|v"
    o: str = "o_proj"
    attn_out: str = ""
    mlp_out: str = ""
    mid: str = "post_attention_layernorm"
    mid_end: str = "in"
    kv_heads: int = 2
    scale: float = 1.0


@dataclass(frozen=True)
class Family:
    build: Callable
    names: Names = Names()
    without: tuple[str, ...] = ()
    refused: str = ""  # what the message of the ModelError has to say


_BASE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GQA = dict(_BASE, num_key_value_heads=2)
_HEADS = dict(_GQA, head_dim=8)
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64)
_LATENT = dict(_BASE, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
_ROUTED = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, **_EXPERTS)
_SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])  # shorter than the prompts
_LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
               linear_key_head_dim=8, linear_value_head_dim=8)
_SSM = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, state_size=8)


def _made(cls: str, **config) -> Callable:
    cls = getattr(transformers, cls)
    return lambda: cls(cls.config_class(**config))


def _rope(kind: str, **parameters) -> dict:
    return dict(rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **parameters})


_GPT2_NAMES = dict(blocks="transformer.h", attn="attn", qkv=("c_attn",), o="c_proj", mid="ln_2", kv_heads=4)
_GPTJ_NAMES = dict(blocks="transformer.h", attn="attn", o="out_proj", kv_heads=4)
_FALCON = dict(blocks="transformer.h", attn="self_attention", qkv=("query_key_value",), o="dense")
_NEOX = Names(blocks="gpt_neox.layers", attn="attention", qkv=("query_key_value",), layout="heads", o="dense", kv_heads=4)
_OPT = dict(blocks="model.decoder.layers", o="out_proj", mlp_out="fc2", kv_heads=4)
_POST_NORM = dict(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", mid="mlp")
_GEMMA = dict(_POST_NORM, mid="pre_feedforward_layernorm")
_MLA = Names(kv_heads=4)
NO_MID = ("resid_mid",)

DEAF = ("pattern", "scores")  # the hooks fire on a pattern that has been used already: they listen, and do not act
LATENT = ("z", "q", "k", "v")  # latent attention: other axes, another number of heads

# What a refusal says.
RECURRENT = "no attn_out in layer 0.*recurrent state"
NO_STREAM = "no resid_[a-z]+ in layer 0.*cannot be reached"
NOT_RESUMED = "cannot be resumed from keys and values"
CRASHES = "cannot be hooked: [A-Za-z]+Error: .+ not understood"
DIFFERS = "differ from the bare model's"

FAMILIES = {
    "gpt2": Family(_made("GPT2LMHeadModel", **_GPT2), Names(**_GPT2_NAMES)),
    "gpt2-scaled-by-layer": Family(_made("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
                                         **_GPT2), Names(**_GPT2_NAMES)),
    "gpt_bigcode": Family(_made("GPTBigCodeForCausalLM", **_GPT2), Names(**_GPT2_NAMES | {"kv_heads": 1})),
    "gptj": Family(_made("GPTJForCausalLM", rotary_dim=4, **_GPT2), Names(**_GPTJ_NAMES), (*NO_MID, *DEAF)),
    "codegen": Family(_made("CodeGenForCausalLM", rotary_dim=4, n_ctx=64, **_GPT2),
                      Names(**_GPTJ_NAMES | dict(qkv=("qkv_proj",), layout="codegen")), NO_MID),
    "gpt_neo": Family(_made("GPTNeoForCausalLM", vocab_size=VOCAB, hidden_size=32, num_layers=LAYERS, num_heads=4,
                            attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64),
                      Names(blocks="transformer.h", attn="attn.attention", o="out_proj", mid="ln_2", kv_heads=4), without=DEAF),
    "gpt_neox": Family(_made("GPTNeoXForCausalLM", **_BASE), _NEOX, NO_MID),
    "gpt_neox-sequential": Family(_made("GPTNeoXForCausalLM", use_parallel_residual=False, **_BASE), _NEOX),
    "gpt_oss": Family(_made("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_rope("default"), **_SLIDING, **_HEADS)),
    "opt": Family(_made("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32, **_BASE), Names(mid="final_layer_norm", **_OPT), without=(*NO_MID, "mlp_out", *DEAF)),
    "opt-350m": Family(_made("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, **_BASE),
                       Names(mid="self_attn_layer_norm", mid_end="out", **_OPT), without=(*NO_MID, "mlp_out", *DEAF)),
    "bloom": Family(_made("BloomForCausalLM", vocab_size=VOCAB, hidden_size=32, n_layer=LAYERS, n_head=4),
                    Names(blocks="transformer.h", attn="self_attention", qkv=("query_key_value",), layout="heads", o="dense",
                          attn_out="self_attention.dense", mlp_out="mlp.dense_4h_to_h", kv_heads=4)),
    "xglm": Family(_made("XGLMForCausalLM", vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=LAYERS, attention_heads=4,
                         max_position_embeddings=64), Names(o="out_proj", mlp_out="fc2", mid="final_layer_norm", kv_heads=4), without=DEAF),
    "mpt": Family(_made("MptForCausalLM", vocab_size=VOCAB, d_model=32, n_layers=LAYERS, n_heads=4, max_seq_len=64, expansion_ratio=2),
                  Names(blocks="transformer.blocks", attn="attn", qkv=("Wqkv",), o="out_proj", mlp_out="ffn.down_proj", mid="norm_2",
                        kv_heads=4)),
    "falcon-7b": Family(_made("FalconForCausalLM", multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False,
                              **_BASE), Names(**_FALCON, kv_heads=1), NO_MID),
    "falcon-40b": Family(_made("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, bias=False, **_BASE),
                         Names(**_FALCON, layout="groups"), NO_MID, refused=CRASHES),
    "falcon-11b": Family(_made("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
                               bias=False, **_BASE), Names(**_FALCON, layout="groups"), NO_MID, refused=CRASHES),
    "falcon-rw": Family(_made("FalconForCausalLM", multi_query=False, parallel_attn=False, new_decoder_architecture=False, alibi=True,
                              bias=True, **_BASE), Names(**_FALCON, layout="heads", kv_heads=4)),
    "llama": Family(_made("LlamaForCausalLM", **_HEADS)),
    "llama-biased": Family(_made("LlamaForCausalLM", attention_bias=True, mlp_bias=True, **_HEADS)),
    "llama-linear": Family(_made("LlamaForCausalLM", **_rope("linear", factor=4.0), **_HEADS)),
    "llama3": Family(_made("LlamaForCausalLM", **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                       original_max_position_embeddings=8), **_HEADS)),
    "llama-yarn": Family(_made("LlamaForCausalLM", **_rope("yarn", factor=4.0, original_max_position_embeddings=16), **_HEADS)),
    "llama-dynamic": Family(_made("LlamaForCausalLM", **_rope("dynamic", factor=4.0), **_HEADS | {"max_position_embeddings": 8})),
    "llama-wide_heads": Family(_made("LlamaForCausalLM", **_HEADS | {"head_dim": 16})),
    "llava": Family(lambda: LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**_HEADS), vision_config=CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14), image_token_index=90)),
                    Names(blocks="model.language_model.layers")),
    "mistral3": Family(lambda: Mistral3ForConditionalGeneration(Mistral3Config(text_config=MistralConfig(sliding_window=4, **_HEADS),
        vision_config=PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                          patch_size=14), image_token_index=90)), Names(blocks="model.language_model.layers")),
    "mistral": Family(_made("MistralForCausalLM", sliding_window=4, **_HEADS)),
    "ministral3": Family(_made("Ministral3ForCausalLM", **_HEADS)),
    "mixtral": Family(_made("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_HEADS)),
    "qwen2": Family(_made("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1, **_GQA)),
    "qwen2_moe": Family(_made("Qwen2MoeForCausalLM", num_experts=4, shared_expert_intermediate_size=16, **_EXPERTS, **_GQA)),
    "qwen3": Family(_made("Qwen3ForCausalLM", **_HEADS)),
    "qwen3_moe": Family(_made("Qwen3MoeForCausalLM", num_experts=4, **_EXPERTS, **_HEADS)),
    "qwen3_next": Family(_made("Qwen3NextForCausalLM", num_experts=4, shared_expert_intermediate_size=16, **_LINEAR, **_EXPERTS,
                               **_HEADS), refused=RECURRENT),
    "qwen3_5": Family(_made("Qwen3_5ForCausalLM", **_LINEAR, **_HEADS), refused=RECURRENT),
    "gemma": Family(_made("GemmaForCausalLM", **_HEADS | {"num_key_value_heads": 1}), Names(kv_heads=1)),
    "gemma2": Family(_made("Gemma2ForCausalLM", sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **_HEADS),
                     Names(**_GEMMA)),
    "gemma3": Family(_made("Gemma3ForCausalLM", query_pre_attn_scalar=8, **_SLIDING, **_HEADS), Names(**_GEMMA)),
    "gemma3-multimodal": Family(BUILDERS["gemma3-multimodal"], Names(blocks="model.language_model.layers", **_GEMMA)),
    "gemma4": Family(_made("Gemma4ForCausalLM", hidden_size_per_layer_input=0, global_head_dim=16, num_kv_shared_layers=0, **_SLIDING,
                           **_HEADS), Names(**_GEMMA), without=DEAF),
    "gemma4-per_layer_inputs": Family(_made("Gemma4ForCausalLM", hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
                                            global_head_dim=8, num_kv_shared_layers=0, **_SLIDING, **_HEADS), Names(**_GEMMA), without=DEAF),
    "gemma4-shared_kv": Family(_made("Gemma4ForCausalLM", hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, global_head_dim=8,
                                     num_kv_shared_layers=1, layer_types=["full_attention"] * 2, **_HEADS), Names(**_GEMMA), refused="cannot run rows that join.*shares the keys and values"),
    "gemma4-k_is_v": Family(_made("Gemma4ForCausalLM", hidden_size_per_layer_input=0, global_head_dim=8, num_kv_shared_layers=0,
                                  attention_k_eq_v=True, num_global_key_value_heads=2, **_SLIDING, **_HEADS), Names(**_GEMMA), without=("v", *DEAF)),
    "vaultgemma": Family(_made("VaultGemmaForCausalLM", query_pre_attn_scalar=8, **_SLIDING, **_HEADS),
                         Names(mid="pre_feedforward_layernorm")),
    "qwen3_5_moe": Family(_made("Qwen3_5MoeForCausalLM", num_experts=4, shared_expert_intermediate_size=16, **_LINEAR, **_EXPERTS,
                                **_HEADS), refused=RECURRENT),
    "recurrent_gemma": Family(_made("RecurrentGemmaForCausalLM", attention_window_size=4, lru_width=32,
                                    block_types=["recurrent", "attention"], **_HEADS), refused=DIFFERS),
    "phi": Family(_made("PhiForCausalLM", **_GQA), Names(o="dense"), NO_MID),
    "phi3": Family(_made("Phi3ForCausalLM", sliding_window=4, **_GQA), Names(qkv=("qkv_proj",))),
    "phi3-longrope": Family(_made("Phi3ForCausalLM", original_max_position_embeddings=8, **_GQA, **_rope(
        "longrope", short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0], original_max_position_embeddings=8)),
                            Names(qkv=("qkv_proj",))),
    "stablelm": Family(_made("StableLmForCausalLM", **_GQA)),
    "stablelm-parallel": Family(_made("StableLmForCausalLM", use_parallel_residual=True, qk_layernorm=True, **_GQA), without=NO_MID),
    "olmo": Family(_made("OlmoForCausalLM", clip_qkv=0.5, **_GQA)),
    "olmo2": Family(_made("Olmo2ForCausalLM", **_GQA), Names(**_POST_NORM)),
    "olmo3": Family(_made("Olmo3ForCausalLM", **_SLIDING, **_GQA), Names(**_POST_NORM)),
    "olmoe": Family(_made("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2, **_GQA)),
    "flex_olmo": Family(_made("FlexOlmoForCausalLM", num_experts=4, num_experts_per_tok=2, **_GQA), Names(**_POST_NORM)),
    "cohere": Family(_made("CohereForCausalLM", **_GQA), without=NO_MID),
    "cohere-qk-norm": Family(_made("CohereForCausalLM", use_qk_norm=True, **_GQA), without=NO_MID),
    "cohere2": Family(_made("Cohere2ForCausalLM", **_SLIDING, **_GQA), without=NO_MID),
    "starcoder2": Family(_made("Starcoder2ForCausalLM", sliding_window=4, **_GQA)),
    "nanochat": Family(_made("NanoChatForCausalLM", **_GQA), without=DEAF),
    "smollm3": Family(_made("SmolLM3ForCausalLM", no_rope_layers=[1, 0], **_GQA)),
    "granite": Family(_made("GraniteForCausalLM", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5,
                            attention_multiplier=0.3, **_GQA), Names(scale=0.5)),
    "granitemoe": Family(_made("GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5,
                               logits_scaling=2.0, **_GQA), Names(mlp="block_sparse_moe", scale=0.5)),
    "granitemoehybrid": Family(_made("GraniteMoeHybridForCausalLM", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48,
                                     layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                                     position_embedding_type="rope", **_GQA), refused=RECURRENT),
    "granite4-nope": Family(_made("GraniteMoeHybridForCausalLM", num_local_experts=0, shared_intermediate_size=48,
                                  layer_types=["attention"] * 2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, **_GQA), refused=CRASHES),
    "deepseek_v2": Family(_made("DeepseekV2ForCausalLM", first_k_dense_replace=1, topk_method="greedy", **_ROUTED, **_LATENT), _MLA, without=LATENT),
    "deepseek_v3": Family(_made("DeepseekV3ForCausalLM", first_k_dense_replace=1, **_ROUTED, **_LATENT), _MLA, without=LATENT),
    "youtu": Family(_made("YoutuForCausalLM", **_LATENT), _MLA, without=LATENT),
    "glm4_moe_lite": Family(_made("Glm4MoeLiteForCausalLM", **_ROUTED, **_LATENT), _MLA, without=LATENT),
    "glm": Family(_made("GlmForCausalLM", **_HEADS)),
    "glm4": Family(_made("Glm4ForCausalLM", **_HEADS), Names(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")),
    "glm4_moe": Family(_made("Glm4MoeForCausalLM", first_k_dense_replace=1, use_qk_norm=True, **_ROUTED, **_HEADS)),
    "ernie4_5": Family(_made("Ernie4_5ForCausalLM", **_HEADS)),
    "ernie4_5_moe": Family(_made("Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
                                 moe_intermediate_size=16, moe_layer_start_index=1, **_GQA)),
    "exaone4": Family(_made("Exaone4ForCausalLM", sliding_window_pattern=2, **_SLIDING, **_GQA), Names(**_POST_NORM)),
    "hunyuan_v1_dense": Family(_made("HunYuanDenseV1ForCausalLM", **_HEADS)),
    "jais2": Family(_made("Jais2ForCausalLM", **_HEADS)),
    "jetmoe": Family(_made("JetMoeForCausalLM", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_key_value_heads=2,
                           kv_channels=8, intermediate_size=48, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2),
                     Names(attn="self_attention"), without=(*LATENT, *DEAF)),
    "laguna": Family(_made("LagunaForCausalLM", num_experts=4, **_EXPERTS, **_HEADS), without=DEAF),
    "llama4": Family(_made("Llama4ForCausalLM", intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0],
                           attention_chunk_size=64, **_HEADS), Names(mlp="feed_forward"), without=DEAF),
    "nemotron": Family(_made("NemotronForCausalLM", **_HEADS)),
    "seed_oss": Family(_made("SeedOssForCausalLM", **_HEADS)),
    "apertus": Family(_made("ApertusForCausalLM", **_GQA), Names(mid="feedforward_layernorm")),
    "arcee": Family(_made("ArceeForCausalLM", **_HEADS)),
    "afmoe": Family(_made("AfmoeForCausalLM", num_experts=4, num_shared_experts=1, num_dense_layers=1, **_SLIDING, **_EXPERTS, **_HEADS),
                    Names(attn_out="post_attention_layernorm", mlp_out="post_mlp_layernorm", mid="pre_mlp_layernorm"), without=DEAF),
    "bitnet": Family(_made("BitNetForCausalLM", **_GQA)),
    "minimax_m2": Family(_made("MiniMaxM2ForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_HEADS)),
    # No attention in some layers, or none at all: a recurrent state that no prefix of keys and values can stand for.
    "lfm2": Family(_made("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], **_GQA), refused=RECURRENT),
    "lfm2_moe": Family(_made("Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"], num_experts=4, num_dense_layers=1, **_EXPERTS,
                             **_GQA), refused=RECURRENT),
    "jamba": Family(_made("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                          num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=8, **_GQA), refused=RECURRENT),
    "bamba": Family(_made("BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                          **_GQA), refused=RECURRENT),
    "zamba2": Family(_made("Zamba2ForCausalLM", layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8,
                           mamba_ngroups=1, num_mem_blocks=1, **_BASE), refused=RECURRENT),
    "nemotron_h": Family(_made("NemotronHForCausalLM", layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=8,
                               ssm_state_size=8, n_groups=1, **_HEADS), refused=RECURRENT),
    "mamba": Family(_made("MambaForCausalLM", **_SSM), refused=RECURRENT),
    "mamba2": Family(_made("Mamba2ForCausalLM", num_heads=8, head_dim=8, n_groups=1, **_SSM), refused=RECURRENT),
    "falcon_mamba": Family(_made("FalconMambaForCausalLM", **_SSM), refused=RECURRENT),
    "rwkv": Family(_made("RwkvForCausalLM", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, attention_hidden_size=32,
                         context_length=64), refused=RECURRENT),
    "olmo_hybrid": Family(_made("OlmoHybridForCausalLM", **_LINEAR, **_GQA), refused=NOT_RESUMED),
    "falcon_h1": Family(_made("FalconH1ForCausalLM", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                              **_HEADS), refused=NOT_RESUMED),
    "glm_moe_dsa": Family(_made("GlmMoeDsaForCausalLM", index_topk=64, index_n_heads=2, index_head_dim=8,
                                mlp_layer_types=["dense", "sparse"], **_ROUTED, **_LATENT), refused=NOT_RESUMED),
    # Refused because of what they are, or because nobody has hooks for them.
    "t5": Family(_made("T5ForConditionalGeneration", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4),
                 refused="is an encoder-decoder"),
    "bart": Family(_made("BartForConditionalGeneration", vocab_size=VOCAB, d_model=32, encoder_layers=LAYERS, decoder_layers=LAYERS,
                         encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                         max_position_embeddings=64), refused="is an encoder-decoder"),
    "bert": Family(_made("BertForMaskedLM", **_BASE), refused="is a masked language model"),
    "roberta": Family(_made("RobertaForMaskedLM", **_BASE), refused="is a masked language model"),
    "bert-decoder": Family(_made("BertLMHeadModel", is_decoder=True, **_BASE), refused=DIFFERS),
    "modernbert_decoder": Family(_made("ModernBertDecoderForCausalLM", local_attention=4, layer_types=_SLIDING["layer_types"], **_BASE),
                                 refused=DIFFERS),
    "bloom-headless": Family(_made("BloomModel", vocab_size=VOCAB, hidden_size=32, n_layer=LAYERS, n_head=4), refused="has no head"),
    "gpt2-headless": Family(_made("GPT2Model", **_GPT2), refused="has no head"),
    "gpt_bigcode-multi_head": Family(_made("GPTBigCodeForCausalLM", multi_query=False, **_GPT2), refused=CRASHES),
    "openai-gpt": Family(_made("OpenAIGPTLMHeadModel", **_GPT2), refused=NO_STREAM),
    "hrm_text": Family(_made("HrmTextForCausalLM", **_BASE), refused=NO_STREAM),
    "deepseek_v4": Family(_made("DeepseekV4ForCausalLM", q_lora_rank=8, qk_rope_head_dim=4, head_dim=8, **_ROUTED, **_BASE),
                          refused=NO_STREAM),
    "gemma3n": Family(_made("Gemma3nForCausalLM", hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0,
                            laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0], **_SLIDING, **_HEADS),
                      refused="no hooks for Gemma3nForCausalLM"),
    "phimoe": Family(_made("PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_GQA),
                     refused="no hooks for PhimoeForCausalLM"),
    "helium": Family(_made("HeliumForCausalLM", **_HEADS), refused="no hooks for HeliumForCausalLM"),
    "persimmon": Family(_made("PersimmonForCausalLM", **_BASE), refused="no hooks for PersimmonForCausalLM"),
    "biogpt": Family(_made("BioGptForCausalLM", **_BASE), refused="no hooks for BioGptForCausalLM"),
}
LOADED = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


def bare(name: str, seed: int = 0):
    """A random Hugging Face model whose weights are large enough for patches to matter; the same for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build().eval()
    model.set_attn_implementation("eager")
    model.config._attn_implementation = "eager"  # Falcon does not listen to the line above
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    return model


def described(name: str) -> dict:
    """One row of the table of the site: what becomes of a family when it is loaded."""
    from bizzaroworld.model.load import load_model
    from bizzaroworld.model.names import ModelError
    hf = bare(name)
    row = {"family": name, "class": type(hf).__name__}
    try: model = load_model(hf)
    except ModelError as error: return row | {"sites": 0, "without": "", "why": re.sub(r" by [\d.]+e-\d+ of their size", "", str(error)).removeprefix(f"{type(hf).__name__!r} ({type(hf).__name__}) ")}  # how far off differs by machine
    gone = [limit.removeprefix("no ").split(": ", 1) for limit in model.limits if limit.startswith("no ")]
    return row | {"sites": len(model.sites), "without": ", ".join(site for site, _ in gone), "why": "; ".join(dict.fromkeys(why for _, why in gone))}


if __name__ == "__main__":
    import pandas as pd
    from bizzaroworld.files import data_path, write_table
    folder = data_path("facts").parent / "architectures"
    folder.mkdir(exist_ok=True)
    write_table(folder / "families.csv", pd.DataFrame([described(name) for name in FAMILIES]))
