"""The chat template: one BOS, the prompt's own last token at the end, and the entity where the prompts differ."""
import json

import pytest
from bizzaroworld.battery.chat import INSTRUCTION, ChatError, chat_head, in_chat
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.model.load import load_model, load_tokenizer
from bizzaroworld.pipeline import run_study

TEMPLATE = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


@pytest.fixture
def tuned():
    """A tokenizer with a template, whose marks of turns are tokens that the model has."""
    tokenizer = load_tokenizer("bizzaro-nano")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_prompts_begin_the_answer(tuned):
    pairs = load_battery()[:5]
    for pair, said in zip(pairs, in_chat(tuned, pairs)):
        bare, tp = align(tuned, pair), align(tuned, said)
        assert tp.clean_ids.count(tuned.bos_token_id) == 1 and tp.clean_ids[0] == tuned.bos_token_id
        assert said.clean_prompt.endswith("<start_of_turn>model\n" + pair.clean_prompt) and INSTRUCTION in said.clean_prompt
        assert tp.clean_ids[tp.entity] == bare.clean_ids[bare.entity] and tp.corrupt_ids[tp.entity] == bare.corrupt_ids[bare.entity]
        assert tp.clean_ids[tp.final] == bare.clean_ids[bare.final] and tp.clean_target_id == bare.clean_target_id
        assert tp.final - tp.entity == bare.final - bare.entity and tp.entity > bare.entity


def test_a_model_without_a_template_is_refused():
    with pytest.raises(ChatError, match="no chat template.*Leave out --chat"): chat_head(load_tokenizer("bizzaro-nano"))


def test_a_run_says_that_it_was_in_chat_and_one_that_was_not_is_as_before(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("bizzaroworld.pipeline.save_figures", lambda *_: None)  # nothing is asked of them here
    battery = tmp_path / "two.json"
    rows = [{k: getattr(p, k) for k in ("id", "category", "relation", "clean_prompt", "corrupt_prompt", "clean_target", "corrupt_target",
                                        "clean_entity", "corrupt_entity")} for p in load_battery()[:2]]
    battery.write_text(json.dumps(rows), "utf-8")
    model = load_model("bizzaro-nano", tokenizer=tuned, device="cpu")
    said, bare = (json.loads((run_study(model, battery=battery, out=tmp_path / str(chat), chat=chat, controls=()) / "run.json").read_text())
                  for chat in (True, False))
    assert said["options"]["chat"] == INSTRUCTION and "chat" not in bare["options"]
    assert said["battery_sha256"] == bare["battery_sha256"] and said["model"] == bare["model"]
