"""Sweeps drawn: the picture that fits, the numbers in it, and the tokens beside it."""
import numpy as np
import pandas as pd
import pytest
from drawn import band, clipped, lines, overlapping, smallest

from bizzaroworld.figures.style import SITE_COLORS
from bizzaroworld.figures.sweeps import PLACE, draw_sweep, row_label, shape_of, token_label
from bizzaroworld.results.estimates import estimate_means


def table(sites=("mlp_out",), layers=range(6), heads=(pd.NA,), positions=("final",), n=8, direction="noising", seed=0):
    """A sweep with other numbers in every cell: pairs outermost, then interventions, then metrics."""
    rng, rows = np.random.default_rng(seed), []
    for p in range(n):
        for site in sites:
            for position in positions:
                for layer in layers:
                    for head in heads:
                        name = f"L{layer}" + ("" if head is pd.NA else f"H{head}") + f" {site} @{position}"
                        for metric in ("ld", "prob"):
                            rows.append((f"p{p}", site, layer, head, position, metric, *rng.normal(0.5, 0.3, 2), direction, name))
    columns = ["pair_id", *PLACE, "metric", "effect", "recovery", "direction", "intervention"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64", "head": "Int64"})


def means(t, metric, value):
    rows = t[t.metric == metric]
    return rows.groupby([*PLACE], dropna=False, sort=False)[value].mean()


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def test_the_shape_follows_from_what_was_swept():
    assert shape_of(table()) == "curves"
    assert shape_of(table(("resid_pre", "mlp_out"))) == "curves"
    assert shape_of(table(positions=("3", "4"))) == "tokens"
    assert shape_of(table(("z",), heads=range(4))) == "heads"
    assert shape_of(table(("z",), heads=range(4), positions=("3", "4"))) == "heads"
    assert shape_of(table(layers=[2])) == "rows"
    windows = table().assign(layer=pd.NA)
    assert shape_of(windows) == "rows"
    twice = table().assign(intervention=lambda t: t.intervention + " = zero")
    assert shape_of(pd.concat([table(), twice])) == "rows", "two interventions at one place would cover each other"
    mixed = pd.concat([table(), table(("z",), heads=range(4))])
    assert shape_of(mixed) == "rows"


@pytest.mark.parametrize("metric, value", [("ld", "recovery"), ("prob", "effect")])
def test_curves_are_the_means_with_their_intervals(metric, value):
    t = table(("resid_pre", "mlp_out", "q"))
    ax, = draw_sweep(t, metric, value).axes
    assert list(lines(ax)) == ["resid_pre", "mlp_out", "q"]
    wide = t[t.metric == metric].pivot(index="pair_id", columns="intervention", values=value)[list(t.intervention.unique())]
    found = estimate_means(wide.to_numpy())
    for i, (site, drawn) in enumerate(lines(ax).items()):
        columns = [f"L{layer} {site} @final" for layer in range(6)]
        np.testing.assert_allclose(drawn.get_ydata(), wide[columns].mean())
        for edge, key in zip(band(ax, i), ("low", "high")): np.testing.assert_allclose(edge, found[key][wide.columns.get_indexer(columns)], atol=0.003)
    assert lines(ax)["resid_pre"].get_color() == SITE_COLORS["resid_pre"]
    assert ax.get_title() == "at final, noising, n = 8"
    assert ax.get_ylabel() == {"recovery": "Recovery of ld", "effect": "Effect on prob (probability)"}[value]
    fits(ax.figure)


@pytest.mark.parametrize("n, bands", [(1, 0), (2, 0), (3, 1)])
def test_a_band_takes_three_pairs(n, bands):
    ax, = draw_sweep(table(n=n)).axes
    assert len(ax.collections) == bands


def test_a_curve_is_in_the_order_of_its_layers():
    t = table(layers=[5, 1, 3])
    np.testing.assert_array_equal(lines(draw_sweep(t).axes[0])["mlp_out"].get_xdata(), [1, 3, 5])


def test_a_map_has_the_tokens_beside_it_and_the_means_in_it():
    t = table(("resid_pre", "attn_out"), positions=[str(i) for i in range(5)])
    figure = draw_sweep(t, tokens=("<bos>", "The", " capital", " of", "\n"))
    left, right, bar = figure.axes
    assert [x.get_text() for x in left.get_yticklabels()] == ["<bos>  0", "The  1", "capital  2", "of  3", "'\\n'  4"]
    assert (left.get_title(), right.get_title()) == ("resid_pre", "attn_out")
    assert left.get_ylim()[0] > left.get_ylim()[1], "the first token is at the top"
    for ax, site in ((left, "resid_pre"), (right, "attn_out")):
        grid = ax.images[0].get_array()
        assert grid.shape == (5, 6)
        for (_, layer, _, position), mean in means(t[t.site == site], "ld", "recovery").items():
            np.testing.assert_allclose(grid[int(position), layer], mean)
    fits(figure)


def test_a_token_is_found_from_either_end_and_a_name_stands_for_itself():
    tokens = ("a", " b", " c")
    assert [token_label(p, tokens) for p in ("1", "-1", "3", "final")] == ["b  1", "c  2", "3", "final"]
    assert token_label("1", ()) == "1"


def test_heads_are_in_a_map_for_each_site_and_position():
    t = table(("z", "q"), heads=range(4), positions=("entity", "final"))
    figure = draw_sweep(t, value="effect")
    assert [ax.get_title() for ax in figure.axes[:4]] == ["z @entity", "z @final", "q @entity", "q @final"]
    for ax in figure.axes[:4]:
        site, position = ax.get_title().split(" @")
        grid = ax.images[0].get_array()
        for (_, layer, head, _), mean in means(t[(t.site == site) & (t.position == position)], "ld", "effect").items():
            np.testing.assert_allclose(grid[layer, head], mean)
        assert ax.get_ylim()[0] < ax.get_ylim()[1], "layers upward"
    fits(figure)


def test_a_site_without_one_of_the_heads_leaves_its_place_empty():
    t = pd.concat([table(("z",), heads=range(4)), table(("k",), heads=[0], seed=1)])
    z, k = draw_sweep(t).axes[:2]
    assert z.images[0].get_array().shape == (6, 4) and k.images[0].get_array().shape == (6, 1)


@pytest.mark.parametrize("direction, value, nothing", [("noising", "recovery", 1), ("denoising", "recovery", 0), ("noising", "effect", 0)])
def test_white_is_where_the_patch_changes_nothing(direction, value, nothing):
    figure = draw_sweep(table(positions=("1", "2"), direction=direction), value=value)
    norm = figure.axes[0].images[0].norm
    assert norm.vcenter == nothing and norm(nothing) == 0.5
    grid = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(norm.halfrange, np.abs(grid - nothing).max())


def test_what_shares_no_axis_has_a_row_each():
    t = table(layers=range(3))
    names = {f"L{l} mlp_out @final": f"L{l} mlp_out @final + L{l + 1} mlp_out @final" for l in range(3)}
    t = t.assign(layer=pd.NA, intervention=t.intervention.map(names))
    ax, = draw_sweep(t, value="effect").axes
    assert [x.get_text() for x in ax.get_yticklabels()] == [f"L{l}, L{l + 1} mlp_out @final" for l in range(3)]
    expected = t[t.metric == "ld"].groupby("intervention", sort=False).effect.mean()
    np.testing.assert_allclose(ax.lines[1].get_xdata(), expected)
    fits(ax.figure)
    with pytest.raises(ValueError, match="60 interventions have no common axis"):
        draw_sweep(table(layers=range(60)).assign(layer=pd.NA))


def test_row_labels():
    assert row_label("L3 z @final") == "L3 z @final"
    assert row_label("L1H0 z @final + L1H3 z @final") == "L1H0, L1H3 z @final"
    assert row_label(" + ".join(f"L{l} scores @final = added" for l in range(8))) == "L0 … L7 scores @final = added"
    assert row_label("L1 mlp_out @entity + L2 attn_out @final") == "L1 mlp_out @entity + L2 attn_out @final"
    assert row_label("L1 mlp_out @entity_span + L2 attn_out @final = zero") == "L1 mlp_out @entity_spa … final = zero"


def test_a_pair_without_a_scale_is_left_out_and_said_so():
    t = table()
    t.loc[t.pair_id == "p3", "recovery"] = np.nan
    ax, = draw_sweep(t).axes
    assert ax.get_title().endswith("n = 7")
    np.testing.assert_allclose(lines(ax)["mlp_out"].get_ydata(), means(t[t.pair_id != "p3"], "ld", "recovery"))
    with pytest.raises(ValueError, match="use value='effect'"): draw_sweep(t.assign(recovery=np.nan))


def test_slips_are_named():
    with pytest.raises(ValueError, match="'kl' was not swept: use ld, prob"): draw_sweep(table(), "kl")
    with pytest.raises(ValueError, match="Unknown value 'patched': use recovery or effect"): draw_sweep(table(), value="patched")
