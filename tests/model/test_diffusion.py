"""Masked-diffusion models are refused in words: from a folder, whose code is not run, and in memory."""
import json

import pytest
from tiny import tiny_hf

from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import ModelError


def test_a_folder_that_brings_its_code_is_not_run(tmp_path):
    folder = tmp_path / "LLaDA-8B-Base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", "architectures": ["LLaDAModelLM"], "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"}}))
    (folder / "configuration_llada.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="brings its own code, which is not run unasked.*masked-diffusion.*such models are refused"): load_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["LLaDAModelLM", "DreamModel"])
def test_one_in_memory_is_refused(kind):
    hf = tiny_hf("llama")
    hf.__class__ = type(kind, (type(hf),), {})
    with pytest.raises(ModelError, match=f"{kind}.*masked-diffusion.*next token of a causal run"): load_model(hf)
