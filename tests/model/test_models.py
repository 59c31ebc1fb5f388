"""Loading: what is accepted, what is refused, and that the checks can fail."""
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import errors
from tiny import BUILDERS, LAYERS, tiny_hf, tiny_model
from transformers import BertConfig, BertForMaskedLM

from bizzaroworld.model import hooked, load as models
from bizzaroworld.model.hooked import Model
from bizzaroworld.model.readout import Readout
from bizzaroworld.model.load import is_embedded, load_model, validate
from bizzaroworld.model.names import ModelError, called, embedded_models


@pytest.mark.parametrize("name", BUILDERS)
def test_logits_equal_the_bare_model(name):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): bare = tiny_hf(name)(ids).logits[:, -1]
    torch.testing.assert_close(tiny_model(name).logits(ids), bare, atol=1e-4, rtol=1e-4)


def test_shape_and_sites_are_read_off_the_architecture():
    gemma, llama, pythia = tiny_model("gemma"), tiny_model("llama"), tiny_model("pythia")
    assert (gemma.n_layers, gemma.n_heads, gemma.n_kv_heads, llama.n_kv_heads) == (LAYERS, 4, 1, 2)
    assert gemma.shape.heads("k") == 1 and gemma.shape.heads("z") == 4 and gemma.shape.heads("resid_pre") == 0
    assert "resid_mid" in gemma.sites and not gemma.limits
    assert "resid_mid" not in pythia.sites and "no resid_mid" in pythia.limits[0]


def test_a_local_folder_is_loaded_like_a_hub_model(tmp_path):
    hf = tiny_hf("gemma")
    hf.save_pretrained(tmp_path)
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(embedded_models()["bizzaro-nano"]).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.weights_sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert model.name == tmp_path.name and not is_embedded(model)
    ids = torch.tensor([[2, 5, 9]])
    with torch.no_grad(): torch.testing.assert_close(model.logits(ids), hf(ids).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_a_model_is_called_by_its_folder_and_known_by_its_weights(tmp_path, monkeypatch):
    folders = [tmp_path / "a" / "mine", tmp_path / "b" / "mine", tmp_path / "b" / "other"]
    for folder in folders: folder.mkdir(parents=True)
    mine, again, other = map(str, folders)
    assert called([mine, other, "google/gemma-2b"]) == ["mine", "other", "google/gemma-2b"] and called([mine + "/"]) == ["mine"]
    assert called([mine, again]) == ["mine (1)", "mine (2)"], "two folders of one name are told apart, and not by whose they are"
    (folders[2] / "small-q4.gguf").touch()
    assert called([f"{other}/small-q4.gguf", "org/repo:small-q4.gguf"]) == ["small-q4", "org/repo:small-q4.gguf"]
    monkeypatch.chdir(mine)
    assert called(["."]) == ["mine"] and called(["../../b/other"]) == ["other"] and called(["bizzaro-nano"]) == ["bizzaro-nano"]
    (tmp_path / "bizzaro-nano").symlink_to(embedded_models()["bizzaro-nano"])
    nano = load_model(str(tmp_path / "bizzaro-nano"))
    assert nano.name == "bizzaro-nano" and is_embedded(nano) and not is_embedded(replace(nano, weights_sha256="other"))


def test_the_hash_is_of_the_weights():
    assert tiny_model("gemma").weights_sha256 == tiny_model("gemma").weights_sha256
    assert tiny_model("gemma").weights_sha256 != tiny_model("gemma", seed=1).weights_sha256


def test_half_precision_is_asked_for_by_name():
    assert load_model("bizzaro-nano", dtype="bfloat16").dtype == torch.bfloat16


def _hub_error(kind, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind("hidden", response=response)


@pytest.mark.parametrize("cause, token, says", [
    (lambda: _hub_error(errors.GatedRepoError, 401), None, "hf auth login"),
    (lambda: _hub_error(errors.GatedRepoError, 403), "hf_secret", "Accept its license at https://huggingface.co/google/gemma-2b"),
    (lambda: _hub_error(errors.RepositoryNotFoundError, 404), None, "misspelt"),
    (lambda: _hub_error(errors.RevisionNotFoundError, 404), None, "no such revision"),
    (lambda: errors.LocalEntryNotFoundError("x"), None, "could not be reached"),
    (lambda: errors.OfflineModeIsEnabled("x"), None, "HF_HUB_OFFLINE"),
    (lambda: OSError("weights are torn"), None, "weights are torn"),
])
def test_each_failure_has_its_own_remedy(monkeypatch, cause, token, says):
    def fail(*args, **kwargs): raise OSError("wrapped by transformers") from cause()
    if "torn" in says: fail = lambda *a, **k: (_ for _ in ()).throw(cause())
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(ModelError) as raised: load_model("google/gemma-2b")
    assert says in str(raised.value) and "hf_secret" not in str(raised.value)


def test_offline_and_not_here():
    with pytest.raises(ModelError, match="Hub could not be reached"): load_model("google/gemma-2b")


def test_the_hub_is_asked_once_before_its_client_asks_again_and_again(monkeypatch):
    def answer(error):
        def ask(url):
            asked.append(url)
            if error: raise error
        return ask
    unknown, gated, busy = (_hub_error(kind, status) for kind, status in (
        (errors.RepositoryNotFoundError, 404), (errors.GatedRepoError, 403), (errors.HfHubHTTPError, 503)))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    for error, says in ((unknown, "misspelt"), (gated, "Accept its license"), (httpx.ConnectError("no route"), "Hub could not be reached"),
                        (httpx.ReadTimeout("slow"), "Hub could not be reached")):
        asked = []
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer(error))
        for name, file in (("google/gemma-2b", "config.json"), ("google/gemma-2b:x.gguf", "x.gguf")):
            with pytest.raises(ModelError, match=says): load_model(name)
            assert asked.pop().endswith(f"/google/gemma-2b/resolve/main/{file}") and not asked
    for error in (None, busy, errors.EntryNotFoundError("an adapter has no config.json")):
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer(error))
        assert models.locate("google/gemma-2b") == "google/gemma-2b"


def test_what_is_on_this_machine_is_not_asked_for(monkeypatch, tmp_path):
    for folder, file in (("models--a--whole", "config.json"), ("models--a--adapter", "adapter_config.json"), ("models--a--file", "x.gguf")):
        there = tmp_path / folder / "snapshots" / ("0" * 40)
        there.mkdir(parents=True)
        (there / file).write_text("{}")
        (tmp_path / folder / "refs").mkdir()
        (tmp_path / folder / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert [models.locate(name) for name in ("a/whole", "a/adapter")] == ["a/whole", "a/adapter"]
    assert models.locate("a/file:x.gguf").endswith("x.gguf")
    with pytest.raises(errors.OfflineModeIsEnabled): models.locate("a/other")


def test_without_a_network_the_answer_comes_at_once():
    code = ("import time; from bizzaroworld.model.load import load_model\nstart = time.monotonic()\ntry: load_model('google/gemma-2b')\n"
            "except ValueError as error: print(error, '|', time.monotonic() - start)")
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    said, seconds = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split("|")
    assert "Hub could not be reached" in said and float(seconds) < 8  # the client's own waits add up to 46


@pytest.mark.parametrize("name, near", [("bizzaro-nanno", "bizzaro-nano"), ("Bizzaro-Micro", "bizzaro-micro"), ("gemma-3-270", "gemma-3-270m")])
def test_a_slip_in_a_name_is_told_at_once(name, near):
    with pytest.raises(ModelError, match=f"no model '{name}'. Did you mean {near}"): load_model(name)


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "gemma-2b", "google/gemma-3-270m"])
def test_other_names_go_to_the_hub(name):
    with pytest.raises(ModelError, match="Hub could not be reached"): load_model(name)


@pytest.mark.parametrize("name, says", [("./nowhere", "no folder"), ("a/b/c", "no folder")])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name, says):
    with pytest.raises(ModelError, match=says): load_model(name)


def test_too_little_memory_is_noticed_before_loading(monkeypatch):
    monkeypatch.setattr(hooked.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained",
                        lambda *a, **k: pytest.fail("the weights were loaded all the same"))
    with pytest.raises(ModelError, match="GiB free.*bfloat16"): load_model("bizzaro-nano", device="cpu")


def test_weight_bytes_are_counted_without_loading():
    from transformers import AutoConfig
    folder = embedded_models()["bizzaro-nano"]
    stored = (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").open("rb").read(8), "little") + 8
    assert models.weight_bytes(AutoConfig.from_pretrained(folder), torch.bfloat16) == stored - header


def test_an_architecture_without_hooks_or_causality_is_refused():
    class Strange(type(tiny_hf("gemma"))): pass
    strange = Strange(tiny_hf("gemma").config)
    with pytest.raises(ModelError, match="no hooks for Strange"): load_model(strange)


@pytest.mark.parametrize("option, says", [({"dtype": "int3"}, "Unknown dtype"), ({"device": "warp"}, "Unknown device")])
def test_options_are_checked(option, says):
    with pytest.raises(ModelError, match=says): load_model("bizzaro-nano", **option)


def test_a_model_whose_logits_change_under_hooks_is_refused():
    model, ids = tiny_model("gemma"), torch.arange(3, 11)[None]
    good = model.logits(ids)
    assert validate(model, good).limits == ()
    with pytest.raises(ModelError, match="differ from the bare model's"): validate(model, good + torch.randn_like(good))


def test_a_silent_hook_is_noticed():
    model, ids = tiny_model("gemma"), torch.arange(3, 11)[None]
    from transformer_lens.hook_points import HookPoint
    deaf = validate(Model(model.bridge, None, "deaf", model.shape, model.readout, model.points | {("z", 1): HookPoint()}), model.logits(ids))
    assert deaf.limits == ("no z: layer 1 has none of its own",) and deaf.sites == tuple(s for s in model.sites if s != "z")
    with pytest.raises(ModelError, match="has no mlp_out in layer 1"):
        validate(Model(model.bridge, None, "deaf", model.shape, model.readout, model.points | {("mlp_out", 1): HookPoint()}), model.logits(ids))


@pytest.mark.parametrize("site", ["attn_out", "z", "q", "k", "v", "pattern", "scores", "mlp_out", "resid_pre", "resid_mid", "resid_post"])
def test_a_hook_that_listens_and_does_not_act_is_noticed(site, monkeypatch):
    """A hook point that hands a copy to its hooks, and goes on with what it had."""
    model, ids = tiny_model("gemma"), torch.arange(3, 11)[None]
    for layer in range(model.n_layers):
        point = model.points[site, layer]
        add = point.add_hook
        def listening(hook, add=add, **options):
            def copied(act, hook_point):
                hook(act.clone(), hook_point)
                return None
            return add(lambda act, hook: copied(act, hook), **options)
        monkeypatch.setattr(point, "add_hook", listening)
    deaf = Model(model.bridge, None, "deaf", model.shape, model.readout, model.points)
    if site == "resid_pre":
        with pytest.raises(ModelError): validate(deaf, model.logits(ids))
    else: assert f"no {site}: its hook listens, and what is written there changes nothing" in validate(deaf, model.logits(ids)).limits


def test_the_readout_by_columns_equals_the_whole_vocabulary():
    head = torch.nn.Linear(8, 50)
    readout = Readout(head, scale=0.5, softcap=3.0, slice_rows=7)
    hidden, columns = torch.randn(4, 8) * 9, torch.tensor([[0, 49], [3, 3], [7, 8], [14, 1]])
    whole = readout(hidden)
    expected = torch.tanh(head(hidden) * 0.5 / 3.0) * 3.0
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(readout(hidden, columns), whole.gather(-1, columns))


@pytest.mark.parametrize("bias", [True, False])
def test_weighted_logits_need_not_be_made(bias):
    readout = Readout(torch.nn.Linear(8, 20_000, bias=bias), scale=0.5)
    hidden, weights = torch.randn(4, 8), torch.randn(3, 20_000).softmax(-1)
    directions, offsets = readout.weighted(weights)
    torch.testing.assert_close(hidden @ directions.T + offsets, readout(hidden) @ weights.T)
    assert Readout(torch.nn.Linear(8, 9), softcap=3.0).weighted(weights) is None


def test_a_model_that_does_not_look_left_to_right_is_refused():
    bert = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16))
    with pytest.raises(ModelError): load_model(bert)


def test_one_stream_is_found_out_not_assumed():
    model, ids = tiny_model("gemma"), torch.arange(3, 11)[None]
    assert model.one_stream
    apart = Model(model.bridge, None, "apart", model.shape, model.readout,
                  model.points | {("resid_post", 0): model.points["resid_post", 1]})
    assert not validate(apart, model.logits(ids)).one_stream
