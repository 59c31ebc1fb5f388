"""Streams in truncated context: what must be exactly 1, what windows allow, kinds of tokens, intervals over texts."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import LAYERS, VOCAB, tiny_hf, tiny_model

from bizzaroworld.battery.tokens import Encoding
from bizzaroworld.model.load import load_model
from bizzaroworld.words import local
from bizzaroworld.words.local import COMMON, ELSEWHERE, ITSELF, KINDS, REPEATED, UNRELATED, hardest_tokens, load_texts, local_processing, locality_table, measure_locality, median_interval, streams, token_kinds, window_reach


def numbers(model, seed: int, n: int) -> str:
    """A text of `n` tokens for a model without a tokenizer: see `as_numbers`."""
    return " ".join(map(str, torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()))


@pytest.fixture
def as_numbers(monkeypatch):
    """Texts are the numbers of their tokens, after the BOS 2."""
    def encode(model, text):
        words, at, spans = text.split(), 0, []
        for word in words:
            spans.append((at, at + len(word)))
            at += len(word) + 1
        return Encoding(text, (2, *map(int, words)), ((0, 0), *spans))
    monkeypatch.setattr(local, "encode", encode)

    def load(name):
        hf = tiny_hf(name)
        model = tiny_model(name)
        object.__setattr__(model, "tokenizer", SimpleNamespace(bos_token_id=2))
        return model, hf
    return load


@torch.no_grad()
def bare(hf, ids) -> torch.Tensor:
    """Streams of the bare model before every block, and after the last one: layer pos d_model. What a block hands on is hooked, since the last hidden state of Hugging Face is after the norm."""
    blocks, found = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers, []
    handles = [blocks[0].register_forward_pre_hook(lambda m, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0].clone()), with_kwargs=True)]
    handles += [b.register_forward_hook(lambda m, args, out: found.append((out[0] if isinstance(out, tuple) else out)[0].clone())) for b in blocks]
    hf(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles: handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2"))
def test_cosines_are_those_of_one_run_for_each_token_and_context(name, as_numbers):
    """Against the bare model that runs every truncated prompt by itself; gpt2's positions are learned, so nothing is 1 there by construction."""
    model, hf = as_numbers(name)
    texts, contexts, skip = [numbers(model, s, n) for s, n in ((0, 11), (1, 9), (2, 4))], (0, 2, 3, 7), 5
    found = measure_locality(model, texts, contexts=contexts, skip=skip, rows=3)
    ids = [list(map(int, t.split())) for t in texts]
    full = [bare(hf, [2, *some])[:, 1:] for some in ids]
    assert found.tokens[["text", "position", "id"]].values.tolist() == [[t, p, some[p]] for t, some in enumerate(ids) for p in range(skip, len(some))]
    every = torch.cat([f[:, skip:] for f in full], 1)
    mean, spread = every.mean(1), every.std(1)
    for row, (t, p) in enumerate(found.tokens[["text", "position"]].itertuples(index=False)):
        for c, context in enumerate(contexts):
            alone = bare(hf, [2, *ids[t][max(0, p - context):p + 1]])[:, -1]
            expected = torch.cosine_similarity(alone - mean, full[t][:, p] - mean, dim=-1)
            assert found.cosines[row, c] == pytest.approx(expected.numpy(), abs=2e-5)
            expected = torch.cosine_similarity((alone - mean) / spread, (full[t][:, p] - mean) / spread, dim=-1)
            assert found.scaled.cosines[row, c] == pytest.approx(expected.numpy(), abs=2e-5)


def test_a_context_as_long_as_the_text_and_the_embedding_are_the_same(as_numbers):
    model, _ = as_numbers("llama")
    found = measure_locality(model, [numbers(model, 0, 9), numbers(model, 1, 7)], contexts=(0, 4, 8), skip=2)
    assert found.cosines[:, 2] == pytest.approx(1, abs=1e-5) and found.cosines[:, :, 0] == pytest.approx(1, abs=1e-5)
    assert (found.cosines[:, 0, 1:] < 0.999).all() and (found.cosines[found.tokens.position > 4, 1, 1:] < 1 - 1e-5).mean() > 0.9


def test_controls_are_other_texts_tokens(as_numbers):
    """The same token of another text, truncated here and in full there; a token that occurs in one text only, if twice, has none. A context that goes beyond the text is all of it."""
    model, hf = as_numbers("llama")
    texts = ["10 11 12 13 50 14 60 60", "20 21 22 23 24 50 25"]
    full = [bare(hf, [2, *map(int, t.split())])[:, 1:] for t in texts]
    mean = torch.cat([f[:, 3:] for f in full], 1).mean(1)
    for contexts, alone in (((1, 3), bare(hf, [2, 11, 12, 13, 50])[:, -1]), ((1, 9), full[0][:, 4])):
        found = measure_locality(model, texts, contexts=contexts, skip=3)
        expected = torch.cosine_similarity(alone - mean, full[1][:, 5] - mean, dim=-1)
        row = found.tokens.index[(found.tokens.text == 0) & (found.tokens.id == 50)][0]
        assert found.elsewhere[row] == pytest.approx(expected.numpy(), abs=2e-5) and expected[0] == pytest.approx(1, abs=1e-5) and expected[-1] < 0.99
        assert np.isnan(found.elsewhere[found.tokens.id != 50]).all() and not np.isnan(found.unrelated).any()
    table = locality_table(found)
    assert table.groupby("against").n.first().to_dict() == {ITSELF: 9, ELSEWHERE: 2, REPEATED: 2, UNRELATED: 9}


@pytest.mark.parametrize("name, sees_all", (("bizzaro-micro", 5), ("bizzaro-nano", 0)))
def test_windows_make_early_layers_exactly_local(name, sees_all):
    """A window of four tokens: the stream before layer l sees 3 l tokens back, no fewer and no more."""
    model = load_model(name)
    reach = window_reach(model)
    assert reach == [3 * l if l <= sees_all else None for l in range(model.n_layers + 1)]
    found = measure_locality(model, list(load_texts().values())[:1], contexts=tuple(range(14)), length=60, skip=20)
    for layer in range(min(6, model.n_layers)):
        for context in found.contexts:
            exact = np.abs(found.cosines[:, context, layer] - 1) < 1e-5
            if reach[layer] is not None and context >= reach[layer]: assert exact.all(), (layer, context)
            elif reach[layer] is None or context <= reach[layer] - 3: assert not exact.all(), (layer, context)
    table = locality_table(found)
    assert table[table.windowed & (table.against == ITSELF)]["median"].min() > 1 - 1e-5
    assert set(table[table.windowed].layer) == set(range(min(sees_all, 4) + 1))


def test_learned_positions_have_no_reach():
    assert window_reach(tiny_model("gpt2")) == [None] * (LAYERS + 1) and window_reach(tiny_model("llama")) == [0] + [None] * LAYERS
    assert window_reach(tiny_model("gemma3")) == [0, 3, None, None]


def test_kinds():
    text = "The owls' nest: 3rd, naïve isn't x2 — of"
    pieces = [("The", "common word"), (" ow", "word begins"), ("ls", "word goes on"), ("'", "punctuation"), (" nest", "whole word"), (":", "punctuation"), (" 3", "number"), ("rd", "whole word"), (",", "punctuation"),
              (" naïve", "whole word"), (" isn", "word begins"), ("'t", "word goes on"), (" x2", "number"), (" —", "punctuation"), (" of", "common word")]
    spans, at = [(0, 0)], 0
    for piece, _ in pieces:
        spans.append((at, at + len(piece)))
        at += len(piece)
    assert at == len(text) and "".join(p for p, _ in pieces) == text
    assert token_kinds(Encoding(text, tuple(range(len(spans))), tuple(spans))) == ["", *(kind for _, kind in pieces)]
    assert len(COMMON) == len(set(COMMON)) == 23 and len(KINDS) == 6


def test_the_texts_have_every_kind_in_most_of_them():
    texts, model = load_texts(), load_model("bizzaro-nano")
    assert len(texts) == 26 and min(map(len, texts.values())) > 800 and "#" not in "".join(texts.values())
    kinds = [set(token_kinds(local.encode(model, text))) for text in texts.values()]
    assert {k: sum(k in some for some in kinds) > 15 for k in KINDS} == dict.fromkeys(KINDS, True)


def test_intervals_are_over_texts_not_over_tokens():
    """Tokens of a text that are all alike tell no more than one of them."""
    rng = np.random.default_rng(0)
    means, texts = rng.normal(size=20), np.repeat(np.arange(20), 200)
    value, low, high = median_interval(means[texts], texts)
    assert low < value < high and high - low > 0.3
    one, low1, high1 = median_interval(rng.normal(size=4000), texts)
    assert high1 - low1 < 0.15 and low1 < one < high1
    assert median_interval(np.ones(50), np.arange(50) % 5) == (1, 1, 1)
    assert median_interval(np.arange(3.0), np.zeros(3, int))[0] == 1 and np.isnan(median_interval(np.arange(3.0), np.zeros(3, int))[1:]).all()


def test_the_interval_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for seed in range(120):
        centers = rng.normal(size=25)
        texts = np.repeat(np.arange(25), 12)
        _, low, high = median_interval(centers[texts] + rng.normal(size=300), texts, seed)
        hits += low <= 0 <= high
    assert 0.85 <= hits / 120 <= 1


def test_the_whole_question_in_tables():
    found = local_processing(load_model("bizzaro-nano"), list(load_texts().values())[4:7], contexts=(0, 2, 5), length=70)
    table, hardest, scaled = found["local"], found["hardest"], found["scaled"]
    assert set(scaled.kind) == {"all"} and len(scaled) == (table.kind == "all").sum() and (scaled["median"] != table[table.kind == "all"]["median"].to_numpy()).any()
    assert set(table.against) == {ITSELF, ELSEWHERE, REPEATED, UNRELATED} and set(table.kind) == {"all", *KINDS}
    whole = table[(table.against == ITSELF) & (table.kind == "all")]
    parts = table[(table.against == ITSELF) & (table.kind != "all")].groupby(["layer", "context"]).n.sum()
    assert (parts == whole.n.iloc[0]).all() and ((table.low <= table["median"]) & (table["median"] <= table.high))[table.texts > 2].all()
    assert (whole[whole.layer == 0]["median"] > 1 - 1e-6).all() and whole.groupby("layer")["median"].apply(lambda m: m.is_monotonic_increasing)[1:].all()
    assert hardest["median"].is_monotonic_increasing and set(hardest.context) <= {5}
    with pytest.raises(ValueError, match="No text has more than 32 tokens"): local_processing(load_model("bizzaro-nano"), ["Short."])


def test_streams_are_before_every_block_and_after_the_last():
    model, hf = tiny_model("gemma3"), tiny_hf("gemma3")
    ids = [2, 5, 9, 17, 4]
    assert streams(model, torch.tensor([ids]))[:, 0] == pytest.approx(bare(hf, ids).numpy(), abs=1e-4)


def test_hardest_tokens_occur_often_enough(as_numbers):
    model, _ = as_numbers("llama")
    found = measure_locality(model, [numbers(model, s, 40) for s in range(4)], contexts=(1, 3), skip=4)
    some = hardest_tokens(found, 1, 3, least=3, most=5)
    assert 0 < len(some) <= 5 and (some.n >= 3).all() and len(hardest_tokens(found, 1, 3, least=1000)) == 0


def test_one_dimension_that_varies_most_decides_the_plain_cosine_and_not_the_scaled_one():
    """Streams of noise that share nothing but one large dimension."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 500, 64, generator=g), torch.randn(1, 500, 64, generator=g)
    a[..., 0] = b[..., 0] = 200 * torch.randn(500, generator=g)
    plain, scaled = local._similar(a, b, (a.mean(1), a.std(1)))
    assert plain.median() > 0.99 and scaled.median().abs() < 0.1
