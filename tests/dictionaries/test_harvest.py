"""Activations of a text: what hooks on the model give, however they are read, stored or interrupted."""
import json
from types import SimpleNamespace

import pytest
import torch

from bizzaroworld.dictionaries.harvest import Streamed, activations, blocks, documents, store
from bizzaroworld.dictionaries.saes import DictionaryError
from bizzaroworld.model.load import load_model

PLACES = [("resid_pre", 2), ("attn_out", 2), ("mlp_out", 4), ("resid_post", 4), ("z", 3)]


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def text(model): return blocks(model, documents("texts"), context=32, n_tokens=1500)


def hooked(model, ids, place):
    "The activations of one place in a whole run."
    found = {}
    with model.hooked([(*place, lambda act: found.setdefault("act", act.detach().clone()))]): model.run(ids)
    return found["act"]


@pytest.fixture
def runs(model, monkeypatch):
    "How many times the model is run."
    counted, run = [], type(model).run
    monkeypatch.setattr(type(model), "run", lambda self, *a, **k: (counted.append(1), run(self, *a, **k))[1])
    return counted


def test_activations_are_what_hooks_give(model, text):
    found = activations(model, text.ids[:5], PLACES, text.lead, at_once=2)
    for place in PLACES:
        act = hooked(model, text.ids[:5], place)
        torch.testing.assert_close(found[place], act[:, 1:].flatten(2), rtol=1e-5, atol=1e-5)
        assert found[place].std() > 0


def test_stopping_early_changes_nothing_and_saves_the_layers_behind(model, text):
    "The last layer is asked for too, so that one of the two runs cannot stop; a hook behind the stop is never reached."
    last, reached = ("resid_post", model.n_layers - 1), []
    short, whole = (activations(model, text.ids[:4], PLACES + more) for more in ([], [last]))
    for place in PLACES: assert torch.equal(short[place], whole[place])
    for more in ([], [last]):
        with model.hooked([("resid_pre", 6, lambda act: reached.append(bool(more)))]): activations(model, text.ids[:4], PLACES + more)
    assert reached == [True]


def test_the_model_is_as_it_was_after_an_early_stop(model, text):
    before = hooked(model, text.ids[:2], ("resid_post", 7))
    activations(model, text.ids[:2], [("resid_post", 1)])
    assert torch.equal(hooked(model, text.ids[:2], ("resid_post", 7)), before)


def test_heads_lie_one_behind_the_other(model, text):
    z, flat = hooked(model, text.ids[:2], ("z", 3)), activations(model, text.ids[:2], [("z", 3)])["z", 3]
    n, d = z.shape[2:]
    assert n == 4 and flat.shape[-1] == n * d and Streamed(model, text, ("z", 3)).heads == n and Streamed(model, text, ("mlp_out", 3)).heads == 1
    for head in range(n): torch.testing.assert_close(flat[..., head * d:(head + 1) * d], z[:, 1:, head])


def test_bos_is_left_out_and_begins_every_block(model, text):
    bos = model.tokenizer.bos_token_id
    assert (text.ids[:, 0] == bos).all() and (text.held[:, 0] == bos).all() and text.lead == 1
    assert not (text.ids[:, 1:] == bos).any()
    assert text.n_tokens == text.ids[:, 1:].numel() == sum(len(Streamed(model, text, ("resid_post", 1), rows=7).chunk(i)) for i in range(len(Streamed(model, text, ("resid_post", 1), rows=7))))


def test_blocks_hold_the_tokens_of_the_text(model):
    "All blocks together, trained on and held out, are the text once, in pieces."
    from bizzaroworld.battery.tokens import encode
    one = "\n".join(documents("texts", 3))
    ids = list(encode(model, one + "\n").ids)[1:]
    cut = blocks(model, [one], context=17, held=0.3)
    pieces = sorted(tuple(row[1:].tolist()) for row in torch.cat([cut.ids, cut.held]))
    assert pieces == sorted(tuple(ids[i:i + 16]) for i in range(0, len(ids) // 16 * 16, 16))
    assert len(cut.held) == round(0.3 * len(pieces))


def test_held_out_blocks_are_not_trained_on(model):
    texts = [f"Number {i} is a number, and {i * i} is its square." for i in range(400)]  # no two blocks alike
    for n in (None, 300):
        cut = blocks(model, texts, n_tokens=n, context=24, held=0.1)
        trained, held = ({tuple(row.tolist()) for row in rows} for rows in (cut.ids, cut.held))
        assert len(trained) == len(cut.ids) and len(held) == len(cut.held) >= 1 and not trained & held
    assert 300 <= cut.n_tokens < 300 + 23


def test_blocks_depend_on_the_seed_alone(model):
    one, same, other = (blocks(model, documents("texts"), 600, 24, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.ids, same.ids) and one.sha256 == same.sha256 != other.sha256


def test_stored_equals_streamed(model, text, tmp_path):
    stored = store(model, text, PLACES, tmp_path, rows=9)
    for place in PLACES:
        streamed = Streamed(model, text, place, rows=9)
        assert len(stored[place]) == len(streamed) == -(-len(text.ids) // 9) and stored[place].heads == streamed.heads and stored[place].name == streamed.name and stored[place].d == streamed.d
        for i in range(len(streamed)):
            assert torch.equal(stored[place].chunk(i), streamed.chunk(i))
            assert stored[place].tokens(i) == streamed.tokens(i) == len(streamed.chunk(i))
    assert len(text.ids) % 9, "the last chunk is shorter"


def test_storing_goes_on_where_it_stopped(model, text, tmp_path, runs):
    def stop(done, of):
        if done == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): store(model, text, PLACES, tmp_path, rows=9, told=stop)
    first, total = len(runs), -(-len(text.ids) // 9)
    assert first == 2
    stored = store(model, text, PLACES, tmp_path, rows=9)
    assert len(runs) == total > 3
    store(model, text, PLACES, tmp_path, rows=9)
    assert len(runs) == total  # nothing is left to do
    streamed = Streamed(model, text, ("z", 3), rows=9)
    assert all(torch.equal(stored["z", 3].chunk(i), streamed.chunk(i)) for i in range(total))


@pytest.mark.parametrize("change, named", [("text", "text_sha256"), ("places", "places"), ("rows", "rows")])
def test_a_folder_of_other_activations_is_refused(model, text, tmp_path, change, named):
    store(model, text, PLACES[:1], tmp_path, rows=20)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = blocks(model, documents("texts"), context=32, n_tokens=1500, seed=1) if change == "text" else text
    with pytest.raises(DictionaryError, match=named): store(model, other, PLACES[1:2] if change == "places" else PLACES[:1], tmp_path, rows=21 if change == "rows" else 20)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == kept


def test_another_models_folder_is_refused(model, text, tmp_path):
    store(model, text, PLACES[:1], tmp_path)
    about = json.loads((tmp_path / "harvest.json").read_text())
    (tmp_path / "harvest.json").write_text(json.dumps(about | {"weights_sha256": "0"}))
    with pytest.raises(DictionaryError, match="weights_sha256"): store(model, text, PLACES[:1], tmp_path)


def test_documents_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "b.txt").write_text("second"); (tmp_path / "in" / "c.txt").write_text("third"); (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("  \n"); (tmp_path / "notes.md").write_text("not read")
    assert documents(tmp_path) == ["first", "second", "third"] and documents(str(tmp_path / "b.txt")) == ["second"] and documents(tmp_path, 2) == ["first", "second"]
    assert documents(["one", " ", "two"]) == ["one", "two"]
    with pytest.raises(DictionaryError, match="no text at"): documents(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DictionaryError, match="holds no .txt file"): documents(tmp_path / "none")


def test_facts_are_made_with_the_seed():
    found = documents("facts", 20)
    assert len(set(found)) == 20 and found != documents("facts", 20, seed=1)


@pytest.mark.parametrize("call, match", [
    (lambda m, t: activations(m, t.ids, [("pattern", 1)]), "no vector for each token"), (lambda m, t: activations(m, t.ids, [("resid_post", 8)]), "layers are 0 to 7"), (lambda m, t: activations(m, t.ids, []), "No place"),
    (lambda m, t: store(m, t, [], "nowhere"), "No place"), (lambda m, t: blocks(m, ["short"]), "at least two blocks"), (lambda m, t: blocks(m, ["a b c"] * 99, context=2), "at least 3"),
    (lambda m, t: blocks(m, ["a b"] * 99, held=1.0, context=8), "a share from 0"), (lambda m, t: blocks(m, ["a b"] * 99, 0, context=8), "1 or more tokens"), (lambda m, t: blocks(m, "one text", context=8), "list of texts"),
])
def test_what_cannot_be_read_is_refused(model, text, call, match):
    with pytest.raises(DictionaryError, match=match): call(model, text)


def test_a_block_longer_than_the_model_has_positions_for_is_refused(model):
    short = SimpleNamespace(tokenizer=model.tokenizer, positions=16)
    assert blocks(short, ["a b c"] * 99, context=16).ids.shape[1] == 16
    with pytest.raises(DictionaryError, match="at most 16"): blocks(short, ["a b c"] * 99, context=17)


def test_an_unknown_site_is_refused(model, text):
    with pytest.raises(ValueError, match="Unknown site"): activations(model, text.ids, [("residual", 1)])
