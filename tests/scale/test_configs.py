"""What is known of a model without its weights: the same as with them, from a folder, a head of a GGUF file, the Hub, or the table."""
import json
from types import SimpleNamespace

import pytest

from bizzaroworld.model.names import ModelError, embedded_models
from bizzaroworld.scale import configs
from bizzaroworld.scale.configs import by_name, gguf_known, look_up, table, weights_among
from bizzaroworld.scale.needs import count, empty_model, shape_of


@pytest.mark.parametrize("name", list(table()))
def test_the_table_has_as_many_parameters_as_are_published(name):
    known, row = by_name(name), table()[name]
    assert count(empty_model(known)).parameters == row["parameters"]
    assert known.disk == known.missing == row["parameters"] * (4 if row["stored"] == "float32" else 2)


@pytest.mark.parametrize("name, row", [
    ("google/gemma-3-12b-it", "gemma-3-12b"), ("EleutherAI/pythia-70m-deduped", "pythia-70m"), ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
    ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b"), ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"), ("openai-community/gpt2-xl", "gpt2-xl"), ("gemma-3-1b", "gemma-3-1b"),
    ("Qwen/Qwen3-8B-Base", "qwen3-8b"), ("google/gemma-2-2b", "gemma-2-2b")])
def test_variants_of_one_shape_go_by_one_name(name, row):
    assert f"({row})" in by_name(name).source


@pytest.mark.parametrize("name", ["google/gemma-2b-sfp", "nobody/gpt2-mine", "pythia-70", "google/gemma-3n-e4b", "Qwen/Qwen2.5-7B-Math"])
def test_what_may_have_another_shape_is_not_guessed(name):
    assert by_name(name) is None


@pytest.mark.parametrize("name", list(embedded_models()))
def test_a_folder_says_what_its_files_weigh(name):
    known, folder = look_up(name), embedded_models()[name]
    assert known.disk == sum(p.stat().st_size for p in folder.glob("*.safetensors")) and known.missing == 0
    assert known.source == "its folder" and known.folder == str(folder) and known.stored == "bfloat16"
    assert 2 * count(empty_model(known)).parameters == pytest.approx(known.disk, rel=0.01)


def test_an_adapter_and_an_empty_folder_are_told(tmp_path):
    with pytest.raises(ModelError, match="config.json"): look_up(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="base"): look_up(str(tmp_path))


def test_the_head_of_a_gguf_file_is_enough(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    from bizzaroworld.model.gguf import read_gguf
    path = write_gguf(tmp_path / "tiny.gguf", "llama31")
    whole, head = look_up(str(path)), read_gguf(path).data_at
    asked = []
    def read(n):
        asked.append(n)
        return path.read_bytes()[:head]
    found = gguf_known("tiny", "its head", read)
    assert shape_of(found.config) == shape_of(whole.config) and count(empty_model(found)) == count(empty_model(whole)) and found.disk == found.missing and asked == [configs.HEAD]
    assert 0 <= whole.disk - found.disk < 32 and whole.disk == path.stat().st_size, "but for what the last tensor is padded with"
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:head + 100])
    partly = look_up(str(cut))
    assert "head" in partly.source and partly.missing == found.disk - head - 100 and shape_of(partly.config) == shape_of(whole.config)


def test_more_of_a_gguf_file_is_read_where_the_head_is_longer(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf
    path, asked = write_gguf(tmp_path / "tiny.gguf", "llama"), []
    monkeypatch.setattr(configs, "HEAD", 64)
    def read(n):
        asked.append(n)
        return path.read_bytes()[:n]
    assert gguf_known("tiny", "its head", read).disk > path.stat().st_size - 32 and asked[:3] == [64, 128, 256]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing" * 10, b"GGUF" + bytes(200)])
def test_what_is_no_gguf_file_is_told(content):
    pytest.importorskip("gguf")
    with pytest.raises(ModelError): gguf_known("x", "its head", lambda n: content[:n])


# -- The Hub, stood in for ---------------------------------------------------------------------------------------------

FILES = {"model-00001-of-00002.safetensors": 400, "model-00002-of-00002.safetensors": 100, "original/consolidated.00.pth": 500, "pytorch_model.bin": 500,
         "config.json": 1, "tokenizer.json": 30, "model.safetensors.index.json": 2}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one repository, `someone/model`, whose configuration is bizzaro-nano's; `hub.config`: what asking for that raises."""
    from transformers import AutoConfig
    stand_in, here = SimpleNamespace(config=None, asked=[]), str(embedded_models()["bizzaro-nano"])
    def info(name, **options):
        stand_in.asked.append(name)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=k, size=v) for k, v in FILES.items()])
    def config(name, **options):
        if stand_in.config: raise stand_in.config
        return AutoConfig.from_pretrained(here)
    monkeypatch.setattr(configs, "_ask_hub", lambda *a: None)
    monkeypatch.setattr(configs, "model_info", info)
    monkeypatch.setattr(configs, "AutoConfig", SimpleNamespace(from_pretrained=config))
    monkeypatch.setattr(configs, "weight_files", lambda *a: [])
    return stand_in


def test_the_hubs_list_of_files_says_what_is_downloaded(hub):
    known = look_up("someone/model")
    assert (known.disk, known.missing, known.source, known.folder) == (500, 500, "the Hub", "") and hub.asked == ["someone/model"]
    assert count(empty_model(known)).parameters == count(empty_model(look_up("bizzaro-nano"))).parameters


def test_a_gated_model_is_planned_from_the_table(hub):
    hub.config = OSError("gated")
    assert "table" in look_up("google/gemma-2b").source
    with pytest.raises(ModelError, match="someone/model"): look_up("someone/model")


def test_weights_are_safetensors_where_there_are_some():
    assert weights_among(FILES) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weights_among({"pytorch_model.bin": 1, "tf_model.h5": 2}) == ["pytorch_model.bin"] and weights_among({"a.txt": 1}) == []


def test_without_network_a_name_that_is_not_known_says_so():
    with pytest.raises(ModelError, match="Hub could not be reached.*config.json alone is enough.*by name \\(gemma, .*this one not"): look_up("nobody/nothing")
    assert "table" in look_up("google/gemma-3-12b-it").source


def test_the_table_is_what_it_says(repo):
    for name, row in json.loads((repo / "data" / "architectures" / "known.json").read_text()).items():
        assert name == name.lower() and "/" in row["hub"] and f"({name})" in by_name(row["hub"]).source
