"""A model that is handed over comes back as it was; two threads do not see each other's patches; what is not understood is said."""
import copy
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from tiny import random_pair, tiny_hf, tiny_model

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.circuits.atp_star import atp_star
from bizzaroworld.circuits.knockout import knockout
from bizzaroworld.files import data_path
from bizzaroworld.model.identity import weights_sha256
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import ModelError
from bizzaroworld.patch.interventions import Edit, grid
from bizzaroworld.patch.sweep import sweep

IDS = torch.arange(3, 11)[None]


def same(a, b): return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["gemma3", "gemma3-multimodal", "gpt2", "llama", "pythia"])
def test_a_model_is_given_back_as_it_was(name, tmp_path):
    hf = tiny_hf(name)
    hf.set_attn_implementation("sdpa")
    before, logits, attention = {k: v.clone() for k, v in hf.state_dict().items()}, hf(input_ids=IDS).logits, hf.config._attn_implementation
    hf.train()
    with load_model(hf) as model:
        assert not hf.training and len(hf.state_dict()) > len(before), "while it is hooked it is another"
        sweep(model, random_pair(1), Edit("resid_pre", 1, "final"), progress=False)
    assert same(hf.state_dict(), before) and hf.training and hf.config._attn_implementation == attention == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert torch.equal(hf.eval()(input_ids=IDS).logits, logits)
    hf.save_pretrained(tmp_path)
    assert same(type(hf).from_pretrained(tmp_path).state_dict(), before)
    again = load_model(hf)
    assert torch.allclose(again.logits(IDS), logits[:, -1].float(), atol=1e-5)
    again.close()
    again.close()


# --- without close: the garbage collector -----------------------------------------------------------------------------

def told(hf):
    "All that a caller could tell a change by."
    config = hf.config
    parts = [config, *(getattr(config, k) for k in config.sub_configs)]
    return {"tensors": {k: v.clone() for k, v in hf.state_dict().items()}, "owners": [(k, id(p), p.requires_grad) for k, p in hf.named_parameters()],
            "buffers": [k for k, _ in hf.named_buffers()], "modules": [(k, isinstance(m, torch.nn.ModuleList) or id(m), m.training) for k, m in hf.named_modules()],
            "attention": [p._attn_implementation for p in parts], "config": config.to_dict(), "own": sorted(vars(hf)),
            "hooks": [k for k, m in hf.named_modules() if m._forward_hooks or m._forward_pre_hooks]}


def assert_told(hf, before):
    now = told(hf)
    assert same(now.pop("tensors"), before["tensors"])
    for key, value in now.items(): assert value == before[key], key


def handed(name="gemma3"):
    "A model that somebody trains: most of it in one mode, some of it in the other."
    hf = tiny_hf(name).train()
    hf.set_attn_implementation("sdpa")
    list(hf.children())[-1].eval()
    list(hf.parameters())[0].requires_grad_(False)
    return hf


@pytest.mark.parametrize("name", ["gemma3", "gemma3-multimodal", "gpt2", "llama", "pythia"])
def test_the_garbage_collector_gives_a_model_back_as_it_was(name, tmp_path):
    hf = handed(name)
    before = told(hf)
    model = load_model(hf)
    sweep(model, random_pair(1), Edit("resid_pre", 1, "final"), progress=False)
    model.bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_pre", lambda act, hook: act)])
    assert len(hf.state_dict()) > len(before["tensors"])
    del model
    gc.collect()
    assert_told(hf, before)
    with load_model(hf) as again: assert len(hf.state_dict()) > len(before["tensors"]) and again.logits(IDS).isfinite().all()
    assert_told(hf, before)
    hf.save_pretrained(tmp_path)
    assert same(type(hf).from_pretrained(tmp_path).state_dict(), before["tensors"])


def test_a_model_stays_hooked_while_anything_made_of_it_is_alive():
    hf = handed()
    before, first = told(hf), load_model(hf)
    expected, last = first.logits(IDS), [load_model(hf), first.without(["z"]), first.bridge]
    assert last[0].bridge is first.bridge
    del first
    while last:
        gc.collect()
        assert len(hf.state_dict()) > len(before["tensors"]) and not hf.training
        model = load_model(hf) if len(last) == 1 else last[0]
        found = []
        with model.hooked([("resid_pre", 1, lambda act: found.append(act.shape))]): assert torch.equal(model.logits(IDS), expected)
        assert found
        del model, last[0]
    gc.collect()
    assert_told(hf, before)


def test_closing_and_then_dropping_is_dropping():
    hf = handed()
    before, model = told(hf), load_model(hf)
    model.close()
    assert_told(hf, before)
    again = load_model(hf)
    del model
    gc.collect()
    assert len(hf.state_dict()) > len(before["tensors"]), "the one that was closed took the hooks of the next"
    again.close()
    del again
    gc.collect()
    assert_told(hf, before)


@pytest.mark.parametrize("load", [lambda: load_model("bizzaro-nano"), lambda: load_model(tiny_hf("gemma3"))])
def test_a_model_that_nobody_else_holds_is_freed(load):
    model = load()
    model.logits(IDS)
    refs = [weakref.ref(x) for x in (model, model.hf, model.bridge, model.readout.head.weight)]
    del model
    gc.collect()
    assert [r() for r in refs] == [None] * 4


def test_a_bridge_that_somebody_else_made_outlives_what_was_loaded_from_it():
    hf = tiny_hf("gpt2")
    bridge = build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config, tokenizer=None)
    keys, expected = list(hf.state_dict()), bridge(IDS)
    model = load_model(bridge)
    del model
    gc.collect()
    assert list(hf.state_dict()) == keys and torch.equal(bridge(IDS), expected)


@pytest.mark.parametrize("step", ["load.bare_logits", "bridge.build_bridge_from_module", "load.validate"])
def test_a_model_that_is_refused_is_given_back_at_once(step, monkeypatch):
    hf = handed()
    before = told(hf)
    monkeypatch.setattr(f"bizzaroworld.model.{step}", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="ZeroDivision"): load_model(hf)
    assert_told(hf, before)


def test_a_refusal_leaves_what_was_loaded_before(monkeypatch):
    hf = handed()
    model = load_model(hf)
    expected = model.logits(IDS)
    monkeypatch.setattr("bizzaroworld.model.load.validate", lambda *_: 1 / 0)
    with pytest.raises(ModelError): load_model(hf)
    with model.hooked([("resid_pre", 1, lambda act: act * 0)]): assert not torch.equal(model.logits(IDS), expected)


def test_a_copy_of_a_hooked_model_is_a_model_of_its_own():
    hf = handed()
    before, model = told(hf), load_model(hf)
    twin = copy.deepcopy(hf)
    other = load_model(twin)
    assert other.hf is twin and other.bridge is not model.bridge and torch.equal(other.logits(IDS), model.logits(IDS))
    with other.hooked([("resid_pre", 0, lambda act: act * 0)]): assert not torch.equal(other.logits(IDS), model.logits(IDS))
    other.close()
    assert same(twin.state_dict(), before["tensors"]) and twin.training and len(hf.state_dict()) > len(before["tensors"])


def test_the_end_of_a_program_is_quiet():
    code = ("import sys; sys.path.insert(0, 'tests'); from tiny import tiny_hf; from bizzaroworld.model.load import load_model\n"
            "hf = tiny_hf('gpt2'); model = load_model(hf); ring = [model]; ring.append(ring)\n"
            "other = load_model('bizzaro-nano'); gone = load_model(tiny_hf('llama')); del gone; print('end')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stdout == "end\n" and not any(w in done.stderr for w in ("Traceback", "ignored")), done.stderr


def test_a_bridge_that_somebody_else_made_keeps_its_hooks():
    bridge = build_bridge_from_module(tiny_hf("gpt2"), "GPT2LMHeadModel", hf_config=tiny_hf("gpt2").config, tokenizer=None)
    keys = list(bridge.original_model.state_dict())
    with load_model(bridge) as model: before = model.logits(IDS)
    assert list(bridge.original_model.state_dict()) == keys and any("_original_component" in k for k in keys)
    assert torch.equal(load_model(bridge).logits(IDS), before)


def test_two_threads_get_what_one_gets():
    """Twenty sweeps in two threads, beside runs without any patch, which must not see them."""
    model, pairs = tiny_model("gemma3"), [random_pair(1), random_pair(2, 11)]
    edits = grid(model, ["resid_pre", "z"], ["final", "entity"])
    expected, alone, found, seen = sweep(model, pairs, edits, progress=False).patched, model.logits(IDS), [], []

    def patch():
        for _ in range(10): found.append(sweep(model, pairs, edits, progress=False).patched)

    def look():
        for _ in range(100): seen.append(model.logits(IDS))
    threads = [threading.Thread(target=t) for t in (patch, patch, look)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 20 and len(seen) == 100, "a thread failed"
    assert all(np.array_equal(f, expected) for f in found) and all(torch.equal(s, alone) for s in seen)


def test_a_model_that_is_trained_in_between_is_not_run_with_dropout():
    model = tiny_model("gpt2")
    before = sweep(model, random_pair(1), Edit("mlp_out", 1, "final"), progress=False).patched
    model.hf.train()
    assert np.array_equal(sweep(model, random_pair(1), Edit("mlp_out", 1, "final"), progress=False).patched, before)


def test_float64_prompts_of_several_lengths_are_those_of_one():
    model = load_model(tiny_hf("gemma3").double())
    pairs = [random_pair(1), random_pair(2, 11), random_pair(3, 9)]
    together = sweep(model, pairs, Edit("resid_pre", 1, "entity"), progress=False).patched
    alone = [sweep(model, tp, Edit("resid_pre", 1, "entity"), progress=False).patched[0] for tp in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_float64_has_its_scores(name):
    """Their mask is beyond float32, and that is no difference: knockouts and the QK fix say what they say in float32."""
    model, single, tp = load_model(tiny_hf(name).double()), tiny_model(name), random_pair(1)
    assert "scores" in model.sites and model.limits == single.limits
    wide, narrow = (knockout(m, tp, metrics="ld").effect for m in (model, single))
    np.testing.assert_allclose(wide, narrow, atol=1e-5)
    assert narrow.abs().max() > 1e-3
    for site in ("q", "k"):
        wide, narrow = (atp_star(m, tp, grad_drop=False).estimates[0][site] for m in (model, single))
        np.testing.assert_allclose(wide, narrow, atol=1e-4)


# --- what people hand over ------------------------------------------------------------------------------------------

def test_a_path_a_loaded_model_and_a_compiled_one_are_taken():
    model = load_model(data_path("models", "bizzaro-nano"))
    assert load_model(model) is model and isinstance(data_path("models", "bizzaro-nano"), Path)
    hf = tiny_hf("gpt2")
    assert load_model(torch.compile(hf)).hf is hf


def test_auto_is_the_type_of_the_checkpoint(tmp_path):
    tiny_hf("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    from bizzaroworld.model.load import load_tokenizer
    load_tokenizer("bizzaro-nano").save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16 and load_model(tmp_path).dtype == torch.float32


class Adapted:
    def merge_and_unload(self): ...


@pytest.mark.parametrize("given, said", [(Adapted(), "merge_and_unload"), (object(), "of a pipeline"), (print, "no Hugging Face language model")])
def test_what_is_no_model_is_told_what_to_give(given, said):
    with pytest.raises(ModelError, match=said): load_model(given)


def test_a_device_that_is_not_there_is_named():
    kind = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ModelError, match=f"no {kind} device here"): load_model("bizzaro-nano", device=kind)


@pytest.mark.parametrize("damage, said", [
    (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "pointer of Git LFS.*git lfs pull"),
    (lambda b: b[:len(b) // 2], "damaged or incomplete"), (lambda b: b"\xff" * 64, "damaged or incomplete"), (lambda b: b"", "damaged or incomplete")])
def test_a_damaged_weights_file_is_named(tmp_path, damage, said):
    hf = tiny_hf("llama")
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=f"model.safetensors.*{said}"): load_model(tmp_path)


def test_weights_with_a_flipped_bit_are_another_model(tmp_path):
    """No file says that they were others; a run of the whole ones is not gone on with."""
    hf = tiny_hf("llama")
    hf.save_pretrained(tmp_path)
    file, before = tmp_path / "model.safetensors", weights_sha256(hf, str(tmp_path))
    raw = file.read_bytes()
    file.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    assert len(before) == 64 and weights_sha256(hf, str(tmp_path)) not in ("", before)


def test_a_model_without_a_tokenizer_says_so():
    with pytest.raises(ValueError, match="has no tokenizer; give one"): sweep(tiny_model("gpt2"), load_battery()[0], Edit("resid_pre", 0, "final"))


@pytest.mark.parametrize("change, said", [
    (dict(corrupt_ids=(3, 4, 5)), "clean prompt has 9 tokens and the corrupted one 3"), (dict(clean_target_id=-1), "token id is outside 0 to 96"),
    (dict(corrupt_target_id=97), "token id is outside"), (dict(entity_span=(3, 12)), "entity span 3 to 12"), (dict(entity_span=(5, 5)), "entity span")])
def test_a_pair_made_by_hand_is_checked(change, said):
    from dataclasses import replace
    with pytest.raises(ValueError, match=said): sweep(tiny_model("gpt2"), replace(random_pair(1), **change), Edit("resid_pre", 0, "final"), progress=False)


def test_a_prompt_longer_than_the_positions_there_are_is_refused():
    long = random_pair(1, 70)
    with pytest.raises(ValueError, match="70 tokens.*positions for 64"): sweep(tiny_model("gpt2"), long, Edit("resid_pre", 0, "final"), progress=False)


@pytest.mark.parametrize("site, head, size", [("resid_pre", None, 1), ("resid_pre", None, 31), ("z", None, (2, 8)), ("z", None, (5, 8)), ("z", 1, 7), ("resid_pre", None, (4, 32))])
def test_a_given_value_of_another_size_is_refused(site, head, size):
    model, e = tiny_model("gemma"), Edit(site, 1, "final", head, "given")
    with pytest.raises(ValueError, match="given as .* is needed"): sweep(model, random_pair(1), e, values={e: torch.zeros(size)}, progress=False)


def test_a_console_that_cannot_print_a_letter_gets_its_file_all_the_same(tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("id,category,relation,clean_prompt,corrupt_prompt,clean_target,corrupt_target,clean_entity,corrupt_entity\n"
                     "★ 日本,c,r,The capital of Germany is the city of,The capital of Russia is the city of, Berlin, Moscow,Germany,Russia\n", "utf-8")
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([Path(sys.executable).with_name("bizzaroworld"), "triage", "--battery", pairs, "--out", tmp_path / "out.csv"], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")
    assert "★ 日本" in (tmp_path / "out.csv").read_text("utf-8") and b"? ??" in done.stdout
