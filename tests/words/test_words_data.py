"""What is committed agrees with itself, with its lists and with what must hold."""
import pandas as pd
import pytest

from bizzaroworld.files import data_path
from bizzaroworld.words.local import ITSELF, KINDS, UNRELATED


def read(model: str, name: str) -> pd.DataFrame: return pd.read_csv(data_path("words", model, f"{name}.csv"))


def test_the_list_of_nouns():
    nouns = pd.read_csv(data_path("words", "plurals.csv"))
    words = [*nouns.singular, *nouns.plural]
    assert len(nouns) == 96 and len(set(words)) == 192 and all(w.isalpha() and w.islower() for w in words) and (nouns.plural.str.endswith("s")).all()
    assert list(nouns.singular) == sorted(nouns.singular)


@pytest.mark.parametrize("name", ("local", "scaled"))
def test_streams_of_gemma(name):
    table = read("gemma-3-270m", name)
    own = table[(table.against == ITSELF) & (table.kind == "all")]
    assert (own[own.layer == 0]["median"] == 1).all() and (own.n == own.n.iloc[0]).all() and (own.texts == 26).all() and sorted(own.context.unique()) == list(range(11)) and own.layer.max() == 18
    assert (own[own.layer > 0].groupby("layer")["median"].apply(lambda m: m.is_monotonic_increasing)).all(), "more context, more alike"
    assert table[table.windowed].layer.unique().tolist() == [0], "a window of 512 makes nothing local here"
    assert ((table.low <= table["median"]) & (table["median"] <= table.high)).all() and table["median"].between(-1, 1).all()
    if name == "local":
        parts = table[(table.against == ITSELF) & (table.kind != "all")]
        assert set(parts.kind) == set(KINDS) and (parts.groupby(["layer", "context"]).n.sum() == own.n.iloc[0]).all()
    else: assert table[table.against == UNRELATED]["median"].abs().max() < 0.1


def test_windows_of_micro_are_seen_in_what_is_committed():
    table = read("bizzaro-micro", "local")
    own = table[table.against == ITSELF]
    assert own[own.windowed]["median"].min() == 1 and own[~own.windowed & (own.context + 3 <= 3 * own.layer.clip(upper=4))]["median"].max() < 1


def test_rows_that_are_alike():
    for model, width in (("gemma-3-270m", 262_144), ("bizzaro-nano", 5120), ("bizzaro-micro", 8192)):
        groups, kinds = read(model, "groups"), read(model, "kinds")
        assert kinds.tokens.sum() == width and kinds.in_groups.sum() == groups["size"].sum() and kinds.in_largest.sum() == groups["size"].iloc[0] and groups["size"].is_monotonic_decreasing
    for model in ("bizzaro-nano", "bizzaro-micro"):
        rows = read(model, "read").set_index("rows")
        assert rows.many["largest group"] == 0 and rows.never["all others"] == 2 and (rows[["never", "few", "many"]].sum(axis=1) == rows.tokens).all()


def test_offsets_and_places_of_gemma():
    offsets, place = read("gemma-3-270m", "offsets"), read("gemma-3-270m", "place")
    assert offsets.groupby("relation").n.nunique().eq(1).all() and offsets[offsets.among == "vocabulary"].chance.max() < 1e-5
    bottom = place[(place.layer == 0) & (place.labels == "real")].set_index("design")
    for design in ("controlled", "naive", "no phrase"): assert bottom.loc[design, ["accuracy", "low", "high"]].tolist() == pytest.approx([1 / 3] * 3, abs=1e-4), "the embedding cannot know the place"
    assert bottom.position_alone["controlled"] == pytest.approx(1 / 3, abs=1e-4) and bottom.position_alone["naive"] == 1
    assert (place[place.labels == "random"].accuracy - 1 / 3).abs().max() < 0.03
