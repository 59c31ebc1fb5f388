"""The study from end to end on checkpoints as people have them: five families in folders, each with its own kind of tokenizer. Weights are random; numbers are held against bare models."""
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from typer.testing import CliRunner
from weekly import mostly

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.cli import app
from bizzaroworld.study.runs import open_run

pytestmark = pytest.mark.slow
PAIRS, LAYERS, EXTRA = 6, 3, 7  # EXTRA: rows of the embedding that no token has
SPLIT = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=64)


def texts():
    """What the tokenizers are trained on: the battery, in which every name becomes one token sooner or later."""
    for pair in load_battery():
        yield from (pair.clean_prompt, pair.corrupt_prompt, *(f"it is {word.strip()} {word.strip()}" for word in (pair.clean_target, pair.corrupt_target, pair.clean_entity, pair.corrupt_entity)) )


def sentencepiece(scheme: str, byte_fallback: bool) -> Tokenizer:
    """As Llama and Mistral have it: words begin with `▁`, and prompts with `<s>`."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)  # for the training alone: merges stay within words
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *([f"<0x{i:02X}>" for i in range(256)] if byte_fallback else [])]
    tok.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False))
    if scheme == "always": tok.pre_tokenizer, tok.normalizer = None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else: tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def byte_level(nfc: bool, split: bool) -> Tokenizer:
    """As GPT-2, Pythia and Qwen have it: bytes, a space before a word belongs to it, no BOS."""
    tok = Tokenizer(models.BPE())
    if nfc: tok.normalizer = normalizers.NFC()
    parts = [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tok.pre_tokenizer = pre_tokenizers.Sequence(parts) if split else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=3000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


@dataclass
class Kind:
    """A family: its tokenizer, its model, its BOS (`None`: it has none) and whether the tokenizer puts it there itself, and where blocks, attention and MLP are."""
    tokenizer: Callable
    model: Callable
    bos: str | None
    puts: bool
    blocks: str
    attention: str
    mlp: str = "mlp"


LLAMA = dict(blocks="model.layers", attention="self_attn.o_proj")
KINDS = {
    "llama": Kind(lambda: sentencepiece("always", True), lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, num_key_value_heads=2, **SIZES)), "<s>", True, **LLAMA),
    "mistral": Kind(lambda: sentencepiece("first", False), lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, num_key_value_heads=2, sliding_window=6, **SIZES)), "<s>", True, **LLAMA),
    "qwen": Kind(lambda: byte_level(True, True), lambda n: Qwen3ForCausalLM(Qwen3Config(vocab_size=n, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **SIZES)), None, False, **LLAMA),
    "pythia": Kind(lambda: byte_level(True, False), lambda n: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=n, **SIZES)), "<|endoftext|>", False, "gpt_neox.layers", "attention.dense"),
    "gpt2": Kind(lambda: byte_level(False, False), lambda n: GPT2LMHeadModel(GPT2Config(vocab_size=n, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64)), "<|endoftext|>", False, "transformer.h", "attn.c_proj")}


@pytest.fixture(scope="module", params=mostly(KINDS, ["llama", "pythia", "gpt2"]))
def checkpoint(request, tmp_path_factory):
    """A folder as `save_pretrained` leaves it, and what kind it is."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("checkpoint") / f"some-{request.param}"
    made = kind.tokenizer()
    specials = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>") if kind.puts else dict(eos_token="<|endoftext|>") | ({"bos_token": kind.bos} if kind.bos else {})
    PreTrainedTokenizerFast(tokenizer_object=made, **specials).save_pretrained(folder)
    torch.manual_seed(0)
    model = kind.model(made.get_vocab_size() + EXTRA)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return kind, folder


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """The study of it by the command."""
    place = tmp_path_factory.mktemp("study")
    (place / "some.json").write_text(json.dumps([vars(pair) for pair in load_battery()[:PAIRS]]))
    done = CliRunner().invoke(app, ["study", "--model", str(checkpoint[1]), "--battery", str(place / "some.json"), "--out", str(place / "run"),
                                    *([] if checkpoint[1].name == "some-llama" else ["--no-report"])])
    assert done.exit_code == 0, done.output
    assert (place / "run" / "report.html").exists() == (checkpoint[1].name == "some-llama")
    return open_run(place / "run")


def bare_ld(model, ids, targets, module=None, put=None):
    """The logit difference of the bare model; `module` gives `put(out)` for its output."""
    def swap(_, args, out): return put(out[0] if isinstance(out, tuple) else out) if not isinstance(out, tuple) else (put(out[0]), *out[1:])
    handle = module.register_forward_hook(swap) if module else None
    try: logits = model(torch.tensor([ids])).logits[0, -1].double()
    finally: handle and handle.remove()
    return float(logits[targets[0]] - logits[targets[1]])


def part(root, dotted):
    for name in dotted.split("."): root = getattr(root, name)
    return root


@torch.no_grad()
def test_its_numbers_are_those_of_the_bare_model(checkpoint, run):
    kind, folder = checkpoint
    bare, tok = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(folder)
    battery, seen = {pair.id: pair for pair in load_battery()}, 0
    assert len(run.triage) >= PAIRS // 2 and not len(run.left_out)
    for row in run.triage.itertuples():
        pair = battery[row.pair_id]
        def read(text): return [tok.bos_token_id] * bool(kind.bos and not kind.puts) + tok(text).input_ids  # a BOS where there is one, as TransformerLens does
        ids = {side: read(getattr(pair, f"{side}_prompt")) for side in ("clean", "corrupt")}
        assert (ids["clean"][0] == tok.bos_token_id) == bool(kind.bos) and len(ids["clean"]) == len(ids["corrupt"])
        whole = [read(getattr(pair, f"{side}_prompt").rstrip() + " " + getattr(pair, f"{side}_target").strip()) for side in ("clean", "corrupt")]
        targets = [w[len(ids["clean"])] for w in whole]
        assert all(len(w) == len(ids["clean"]) + 1 for w in whole)
        assert np.isclose(bare_ld(bare, ids["clean"], targets), row.ld_clean, atol=2e-4) and np.isclose(bare_ld(bare, ids["corrupt"], targets), row.ld_corrupt, atol=2e-4)
        at = {"final": -1, "entity": max(i for i, (a, b) in enumerate(zip(ids["clean"], ids["corrupt"])) if a != b) - len(ids["clean"])}
        effects = run.effects[(run.effects.pair_id == row.pair_id) & run.effects["head"].isna()].set_index(["site", "layer", "position"]).patched
        for layer in range(LAYERS):
            block = part(bare, kind.blocks)[layer]
            for site, module in (("resid_post", block), ("attn_out", part(block, kind.attention)), ("mlp_out", part(block, kind.mlp))):
                kept = []
                bare_ld(bare, ids["corrupt"], targets, module, lambda out: kept.append(out.clone()) or out)
                for name, p in at.items():
                    if (site, layer, name) not in effects.index: continue
                    def put(out, p=p): return torch.cat([out[:, :p % out.shape[1]], kept[0][:, [p]], out[:, p % out.shape[1] + 1:]], 1)
                    wanted = effects.loc[(site, layer, name)]
                    assert np.isclose(bare_ld(bare, ids["clean"], targets, module, put), wanted if np.isscalar(wanted) else wanted.iloc[0], atol=2e-4), (row.pair_id, site, layer, name)
                    seen += 1
    assert seen >= 6 * LAYERS * len(run.triage)


def test_the_other_commands_take_it_too(checkpoint, tmp_path):
    if checkpoint[1].name not in ("some-llama", "some-gpt2"): pytest.skip("one with a BOS of its own and one without will do")
    for words in (["triage"], ["methods", "--task", "facts", "--pairs", "3", "--out", str(tmp_path / "grid")], ["plan"]):
        done = CliRunner().invoke(app, [words[0], "--model", str(checkpoint[1]), *words[1:]])
        assert done.exit_code == 0, done.output
        assert str(checkpoint[1].parent) not in done.output
    done = CliRunner().invoke(app, ["audit", str(checkpoint[1])])
    assert done.exit_code == 0 and "some-" in done.output


def test_nothing_of_the_run_says_where_the_checkpoint_lies(checkpoint, run):
    for path in run.folder.rglob("*"):
        if path.suffix in (".json", ".csv", ".html"): assert str(checkpoint[1].parent) not in path.read_text("utf-8"), path
    assert isinstance(run.effects, pd.DataFrame) and set(run.effects.experiment) >= {"1", "2A", "2B", "3", "4"}
