"""Planted embeddings with known duplicates and offsets, probes at chance where nothing can be known, designs that are crossed."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.sparse.csgraph import connected_components
from tiny import tiny_model

from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.model.load import load_model
from bizzaroworld.words.embeddings import (
    DESIGNS, POSITIONS, embedding_report, embedding_rows, identical_groups, near_identical, nearest, offset_accuracy, offset_parallel, place_samples, place_table, probe, read_table,
    sample_streams, tokens_read, vocabulary_kinds, word_pairs, written)
from bizzaroworld.words.local import streams
from bizzaroworld.zoo.corpus import generate, split


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10 ** 6), st.integers(2, 90), st.sampled_from([2, 5, 40, 130]), st.floats(0.5, 0.999), st.sampled_from([0.0, 1.0, 20.0]))
def test_groups_are_the_components_of_all_pairs(seed, n, width, least, common):
    """Against all cosines, in blocks of other sizes; with a part that all rows share, which makes them similar."""
    rows = noise(n, width, seed=seed) + common * noise(width, seed=1)
    rows[n // 2:n // 2 + n // 4] = rows[:n // 4] + 0.05 * noise(n // 4, width, seed=seed + 1)
    cosines = torch.cosine_similarity(rows[:, None], rows[None], dim=-1).numpy()
    if (np.abs(cosines - least) < 1e-5).any(): return
    labels = connected_components(cosines >= least, directed=False)[1]
    expected = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    assert near_identical(rows, least, chunk=7, wide=11, size=3).tolist() == expected.tolist() == near_identical(rows, least).tolist()


def test_rows_that_were_planted_are_found_and_no_others():
    rows = noise(3000, 64)
    rows[1000:1300] = rows[:1] * torch.linspace(0.5, 2, 300)[:, None] + 0.02 * noise(300, 64, seed=1)
    rows[2000:2002] = rows[5:6]
    leader = near_identical(rows)
    assert np.flatnonzero(leader == 0).tolist() == [0, *range(1000, 1300)] and np.flatnonzero(leader == 5).tolist() == [5, 2000, 2001]
    assert len(np.unique(leader)) == 3000 - 300 - 2


@given(st.integers(0, 10 ** 6), st.integers(2, 60))
def test_nearest_is_the_largest_of_all_cosines(seed, n):
    rows, queries = noise(n, 6, seed=seed), noise(4, 6, seed=seed + 1)
    scores = torch.cosine_similarity(queries[:, None], rows[None], dim=-1)
    assert nearest(queries, rows, chunk=7).tolist() == scores.argmax(1).tolist()
    without = torch.randint(0, n, (4,), generator=torch.Generator().manual_seed(seed))
    scores[torch.arange(4), without] = -2
    assert nearest(queries, rows, without, chunk=5).tolist() == scores.argmax(1).tolist()


def planted_pairs(strength: float) -> tuple[torch.Tensor, pd.DataFrame]:
    """Two relations of forty pairs among 1,000 random rows: second word = first word + an offset + noise."""
    rows, tables = noise(1000, 64), []
    for k, relation in enumerate(("one", "two")):
        a, b = torch.arange(200 * k, 200 * k + 40), torch.arange(200 * k + 100, 200 * k + 140)
        rows[b] = rows[a] + strength * noise(64, seed=7 + k) + 0.2 * noise(40, 64, seed=9 + k)
        tables.append(pd.DataFrame({"relation": relation, "a": "x", "b": "y", "a_id": a.numpy(), "b_id": b.numpy()}))
    return rows, pd.concat(tables)


def test_planted_offsets_are_found_and_the_rules_without_them_are_not_enough():
    rows, pairs = planted_pairs(1.5)
    found = offset_accuracy(rows, pairs).set_index(["relation", "rule", "allowed", "among"]).accuracy.unstack(["allowed", "among"])
    assert (found.xs("offset", level="rule") == 1).all(axis=None)
    assert (found.xs("no offset", level="rule")[True, "vocabulary"] == 0).all(), "the nearest row is the word itself"
    parallel = offset_parallel(rows, pairs).set_index(["relation", "pairing"])
    assert (parallel.xs("real", level="pairing")["mean"] > 0.95).all() and (parallel.xs("at random", level="pairing")["mean"] < 0.85).all()
    assert (parallel.low < parallel["mean"]).all() and (parallel["mean"] < parallel.high).all()


def test_where_no_offset_is_planted_none_is_found():
    """Second words that are random rows: no rule does better than chance; offsets are no more parallel than those of another pairing."""
    _, pairs = planted_pairs(0)
    rows = noise(1000, 64, seed=20)
    found = offset_accuracy(rows, pairs)
    assert found[found.among == "vocabulary"].accuracy.max() <= 0.025 and found[found.among == "second words"].accuracy.mean() < 0.1
    assert (found.chance.groupby(found.among).first() == pd.Series({"second words": 1 / 40, "vocabulary": 1 / 999})).all()
    parallel = offset_parallel(rows, pairs).pivot(index="relation", columns="pairing", values="mean")
    assert (parallel["real"] - parallel["at random"]).abs().max() < 0.06


def test_an_offset_is_left_out_of_its_own_mean():
    """Four offsets that are orthogonal: the mean of the others is orthogonal to each."""
    rows = torch.zeros(8, 16)
    rows[:4, :4] = 5 * torch.eye(4)
    rows[4:] = rows[:4] + torch.eye(16)[8:12]
    pairs = pd.DataFrame({"relation": "r", "a_id": range(4), "b_id": range(4, 8)})
    found = offset_parallel(rows, pairs).set_index("pairing")
    assert found["mean"]["real"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="Fewer than three pairs of r"): offset_accuracy(rows, pairs[:2])


def test_embeddings_are_as_the_model_scales_them(nano):
    rows = embedding_rows(nano, chunk=1000)
    assert rows.shape == (nano.d_vocab, nano.d_model)
    ids = torch.tensor([[2, 700, 1500, 4000]])
    assert rows[ids[0]] == pytest.approx(streams(nano, ids)[0, 0].numpy(), abs=1e-5)


def test_kinds_of_the_vocabulary(nano):
    kinds = vocabulary_kinds(nano)
    assert len(kinds) == nano.d_vocab and kinds.count("byte") == 256 and kinds[:4] == ["special"] * 4
    pieces = nano.tokenizer.convert_ids_to_tokens(list(range(nano.d_vocab)))
    assert {p[0] for p, k in zip(pieces, kinds) if k == "word after a space"} == {"▁"} and "number" in kinds


def test_kinds_of_gemma(tokenizer_folders):
    from types import SimpleNamespace

    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tokenizer_folders["gemma-3"])
    model = SimpleNamespace(tokenizer=tok, d_vocab=len(tok) + 3)
    kinds = vocabulary_kinds(model)
    assert kinds[-3:] == ["none"] * 3 and kinds.count("byte") == 256 and kinds.count("unused") > 6000
    def kind(piece): return kinds[tok.convert_tokens_to_ids(piece)]
    assert [kind(p) for p in ("▁the", "the", "<bos>", "</table>", "\n\n", "7", "▁{", "<0x41>", "の")] == ["word after a space", "letters", "special", "markup", "space", "number", "code or symbols", "byte", "other scripts"]
    ids = [tok.convert_tokens_to_ids(p) for p in ("<0x41>", "A", "▁the", "の")]
    assert written(model, ids) == [False, True, True, True]


def test_rows_of_a_trained_model_are_alike_where_nothing_was_read(nano):
    rows = embedding_rows(nano)
    found = identical_groups(nano, rows)
    groups, kinds = found["groups"], found["kinds"]
    assert kinds.tokens.sum() == nano.d_vocab and kinds.in_groups.sum() == groups["size"].sum() and kinds.in_largest.sum() == groups["size"][0]
    assert groups["lowest"].min() > 0.9 and (groups["size"] > 1).all()
    pairs = load_battery() + load_spares()
    counts = tokens_read(nano, [d.text for d in generate(split(load_facts(), pairs), pairs, 4000)])
    table = read_table(near_identical(rows), counts).set_index("rows")
    assert (table[["never", "few", "many"]].sum(axis=1) == table.tokens).all() and table.tokens.sum() == nano.d_vocab
    assert table.many["largest group"] == 0 and table.never["largest group"] > 1000 and table.many["all others"] > 1000


@pytest.mark.slow
@pytest.mark.weekly
def test_a_row_is_alike_exactly_if_its_token_was_never_or_hardly_read(nano):
    """The whole corpus: of the others only what is not text was never read, of the group nothing ten times."""
    pairs = load_battery() + load_spares()
    counts = tokens_read(nano, [d.text for d in generate(split(load_facts(), pairs), pairs, 160_000)])
    leader = near_identical(embedding_rows(nano))
    group = leader == np.bincount(leader).argmax()
    assert counts[group].max() < 10 and sorted(nano.tokenizer.convert_ids_to_tokens(np.flatnonzero(~group & (counts == 0)).tolist())) == ["<bos>", "<eos>"]


def test_word_pairs_are_single_tokens_that_follow(nano):
    pairs = word_pairs(nano)
    assert set(pairs.relation) <= {"capital", "plural", "space", "capital letter"} and (pairs.a_id != pairs.b_id).all()
    pieces = nano.tokenizer.convert_ids_to_tokens
    assert [p.replace("▁", " ") for p in pieces(list(pairs.a_id))] == list(pairs.a) and [p.replace("▁", " ") for p in pieces(list(pairs.b_id))] == list(pairs.b)


def test_a_probe_on_random_labels_is_at_chance_and_on_planted_ones_right():
    rng = np.random.default_rng(0)
    features, groups, labels = rng.normal(size=(900, 40)), np.arange(900) // 3, np.arange(900) % 3
    assert probe(features, rng.permutation(labels), groups).mean() == pytest.approx(1 / 3, abs=0.04)
    features[:, 0] += 6 * labels
    right = probe(features, labels, groups)
    assert right.min() > 0.97 and len(right) == 10


def test_a_probe_is_tested_on_groups_that_it_was_not_trained_on():
    """A feature that tells the group, and labels that are the group's: there is nothing to carry over."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 10)
    labels = rng.integers(0, 3, 60)[groups]
    assert probe(np.eye(60)[groups], labels, groups).mean() < 0.5


def test_the_controlled_design_is_crossed(nano):
    """At every position as many of each place, and every word as often at each of them."""
    samples = place_samples(nano, "controlled")
    word = samples.ids.map(lambda ids: ids[-1])
    counts = samples.groupby([word.rename("word"), "place", "position"]).size().unstack(["place", "position"])
    assert counts.notna().all(axis=None) and (counts == 1).all(axis=None) and counts.shape[1] == 9
    assert (samples.ids.map(len) == samples.position + 1).all() and samples.space.all() and samples.ids.map(lambda ids: ids[0] == nano.tokenizer.bos_token_id).all()
    by_group = samples.assign(word=word).groupby("group").word.nunique()
    assert (by_group == 3).all() and by_group.sum() == word.nunique(), "no word in two phrases"


def test_other_designs_are_what_they_say(nano):
    naive, alone, pieces, rest = (place_samples(nano, d) for d in DESIGNS[1:])
    assert (naive.position - naive.place == POSITIONS[0] - 1).all() and (alone.position - alone.place == POSITIONS[0] - 1).all()
    nouns = set(naive.ids.map(lambda ids: ids[-1]))
    assert alone.ids.map(lambda ids: set(ids[1:]) <= nouns and len(set(ids)) == len(ids)).all()
    assert not naive.ids.map(lambda ids: set(ids[1:]) <= nouns).any()
    assert (pieces.space == (pieces.place == 1)).all() and not rest.space.any() and set(rest.place) == {2, 3}
    assert pd.crosstab(pieces.place, pieces.position).to_numpy().std() == 0
    with pytest.raises(ValueError, match="Unknown design 'other': use one of controlled, naive"): place_samples(nano, "other")


def test_streams_of_samples_are_those_of_each_prompt(nano):
    samples = place_samples(nano, "controlled")[::97]
    found = sample_streams(nano, samples, rows=3)
    for i, ids in enumerate(samples.ids): assert found[:, i] == pytest.approx(streams(nano, torch.tensor([list(ids)]))[:, 0, -1].numpy(), abs=1e-4)


def test_the_embedding_cannot_know_the_place_and_position_alone_says_it_only_in_the_naive_design(nano):
    """Exactly one third at layer 0: a word has one vector, which is right at one of its three places."""
    table = place_table(nano, ["controlled", "naive"], layers=[0, 2], splits=4)
    real = table[table.labels == "real"].set_index(["design", "layer"])
    for design in ("controlled", "naive"): assert real.loc[(design, 0), ["accuracy", "low", "high"]].tolist() == pytest.approx([1 / 3] * 3)
    assert real.position_alone["controlled", 0] == pytest.approx(1 / 3) and real.position_alone["naive", 0] == 1 and real.space_alone["controlled", 0] == pytest.approx(1 / 3)
    assert real.accuracy["naive", 2] > 0.38 > real.accuracy["naive", 0]
    assert (table[table.labels == "random"].accuracy - 1 / 3).abs().max() < 0.06
    pieces = place_table(nano, ["pieces"], layers=[0], splits=4)
    if len(pieces): assert pieces.space_alone[0] == pytest.approx(2 / 3) and pieces.position_alone[0] == pytest.approx(1 / 3)


def test_the_whole_report(nano):
    found = embedding_report(nano, splits=2)
    assert list(found) == ["groups", "kinds", "offsets", "parallel", "place"] and all(len(table) for table in found.values())


def test_any_model_has_rows():
    for name in ("gpt2", "llama", "gemma3"):
        model = tiny_model(name)
        rows = embedding_rows(model, chunk=10)
        assert rows.shape == (model.d_vocab, model.d_model) and len(near_identical(rows)) == model.d_vocab
