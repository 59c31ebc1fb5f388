"""Figures of circuits: the graph has the edges that it should have, and what is drawn are the tables."""
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, legend_texts, lines, overlapping, smallest

from bizzaroworld.figures.circuits_figures import (BOXES, EDGE, END, FLOOR, KEPT, SHARES, START, circuit_graph, circuit_plate, cuts_plate, draw_circuit, draw_cuts,
                                                   draw_estimates, draw_faithfulness, edge_table, estimates_plate, faithfulness_plate, kind_of, layout, shares, when, width_of)

WAY = {("entity", "embed", "L0.mlp"): 0.9, ("entity", "L0.mlp", "L3.mlp"): 0.5, ("routing", "L3.mlp", "L5H1"): 0.4, ("routing", "L0.mlp", "L5H3"): 0.3,
       ("final", "L5H1", "L6.mlp"): 0.2, ("final", "L5H3", "L6.mlp"): -0.15, ("final", "L6.mlp", "logits"): 0.1, ("final", "L5H1", "logits"): 0.08}
ASTRAY = {("entity", "L0.mlp", "L9.mlp"): 0.8, ("final", "L1.mlp", "logits"): -0.7, ("entity", "L2H0", "L3.mlp"): 0.6}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def rows_of(strengths, n=6, spread=0.05, swing=-20.0):
    """Path effects with these mean shares; each edge varies over the pairs by `spread` of its share."""
    shifts = np.linspace(-1, 1, n)
    return pd.DataFrame([dict(zip(EDGE, edge), pair_id=f"p{i}", clean=8.0, corrupt=8.0 + swing, effect=swing * share * (1 + spread * shifts[i]))
                         for edge, share in strengths.items() for i in range(n)])


def edges_of(graph):
    return {(d["lane"], d["sender"], d["receiver"]) for *_, d in graph.edges(data=True)}


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def test_a_share_is_one_where_the_other_run_is_reached():
    assert shares(pd.DataFrame({"clean": [5.0, 5.0, -3.0], "corrupt": [-5.0, -5.0, 4.0], "effect": [-10.0, 5.0, 3.5]})).tolist() == [1, -0.5, 0.5]


def test_an_edge_table_has_the_strongest_edges_first_with_their_intervals():
    table = edge_table(rows_of(WAY), top=5)
    assert table[EDGE].apply(tuple, axis=1).tolist() == list(WAY)[:5] and set(table.n) == {6}
    np.testing.assert_allclose(table["mean"], list(WAY.values())[:5])
    assert ((table.low < table["mean"]) & (table["mean"] < table.high)).all()
    assert (table.high - table.low < 0.1 * table["mean"]).all()


def test_only_edges_on_a_way_from_the_embedding_to_the_logits_are_drawn():
    graph = circuit_graph(edge_table(rows_of(WAY | ASTRAY)))
    assert edges_of(graph) == set(WAY) and graph.nodes >= {START, END}
    assert all(d["mean"] == pytest.approx(WAY[d["lane"], d["sender"], d["receiver"]]) for *_, d in graph.edges(data=True))


def test_a_component_at_the_entity_is_another_than_at_the_final_token():
    """What L3.mlp reads at the entity does not lead on from what it writes at the end."""
    graph = circuit_graph(edge_table(rows_of({("entity", "embed", "L3.mlp"): 0.9, ("final", "L3.mlp", "logits"): 0.9})))
    assert graph.number_of_edges() == 0


def test_as_many_edges_as_asked_for_or_fewer():
    table = edge_table(rows_of(WAY | ASTRAY))
    sizes = {most: circuit_graph(table, most).number_of_edges() for most in range(10)}
    assert all(n <= most for most, n in sizes.items()) and sizes[8] == 8 and sizes[3] == 0
    strongest = edges_of(circuit_graph(table, 5))
    assert strongest < edges_of(circuit_graph(table, 8)) and ("final", "L5H1", "logits") not in strongest


def test_edges_that_may_be_nothing_are_passed_over():
    """One whose interval includes 0 is left out, and with it what it alone leads to."""
    unsure = rows_of({("routing", "L3.mlp", "L5H1"): 0.4}, spread=4)
    rest = rows_of({edge: share for edge, share in WAY.items() if edge != ("routing", "L3.mlp", "L5H1")})
    assert edges_of(circuit_graph(edge_table(pd.concat([rest, unsure])))) == {edge for edge in WAY if "L5H1" not in edge and "L3.mlp" not in edge}


def test_names_say_when_and_what():
    assert [kind_of(n) for n in ("embed", "logits", "L3.mlp", "L12H1")] == ["end", "end", "mlp", "head"]
    assert sorted(["logits", "L10H0", "L2.mlp", "L2H3", "L2H1", "embed", "L10.mlp"], key=when) == ["embed", "L2H1", "L2H3", "L2.mlp", "L10H0", "L10.mlp", "logits"]


def test_every_arrow_leads_upward_and_no_boxes_share_a_place():
    more = WAY | {("routing", "L0.mlp", f"L5H{h}"): 0.3 for h in range(4)} | {("final", f"L5H{h}", "L6.mlp"): 0.2 for h in range(4)} | {("entity", "L0.mlp", "L3H0"): 0.3, ("routing", "L3H0", "L5H0"): 0.3}
    graph = circuit_graph(edge_table(rows_of(more)), 30)
    places = layout(graph)
    assert len(set(places.values())) == graph.number_of_nodes() and all(places[a][1] < places[b][1] for a, b in graph.edges)
    assert all((places[node][0] < 2.4) == (node[1] == "entity") for node in graph)
    fits(draw_circuit(graph))


def test_the_graph_is_drawn_as_it_is():
    graph = circuit_graph(edge_table(rows_of(WAY)))
    figure = draw_circuit(graph)
    ax, places = figure.axes[0], layout(graph)
    boxes = {t.get_text(): t for t in ax.texts if t.get_bbox_patch() is not None}
    assert sorted(boxes) == sorted({name for name, _ in graph})
    assert all(boxes[name].get_position() == places[name, at] for name, at in graph)
    assert all(plt.matplotlib.colors.to_hex(boxes[name].get_bbox_patch().get_facecolor()) == plt.matplotlib.colors.to_hex(BOXES[kind_of(name)]) for name, _ in graph)
    arrows = {(tuple(t.xyann), tuple(t.xy)): t.arrow_patch for t in ax.texts if getattr(t, "arrow_patch", None) is not None}
    assert set(arrows) == {(places[a], places[b]) for a, b in graph.edges}
    for a, b, share in graph.edges(data="mean"):
        arrow, look = arrows[places[a], places[b]], SHARES["positive" if share > 0 else "negative"]
        assert arrow.get_linewidth() == pytest.approx(width_of(share)) and arrow.get_linestyle() == look["ls"]
        assert plt.matplotlib.colors.same_color(arrow.get_edgecolor()[:3], look["color"])
    fits(figure)


def test_an_empty_graph_is_drawn_too():
    fits(draw_circuit(nx.DiGraph()))


@pytest.fixture
def audit():
    rng = np.random.default_rng(0)
    exact = -10.0 * np.array([0.5, 0.2, 0.004, 0.3, 0.1])
    return pd.DataFrame({"pair_id": "p", "site": ["q", "z", "k", "v", "mlp_out"], "clean": 4.0, "corrupt": -6.0, "effect": exact, "atp": exact * [0, 1, 1, -1, 0.5],
                         "atp_qk": exact + rng.normal(0, 0.001, 5)})


def test_estimates_are_drawn_beside_exact_effects(audit):
    figure = draw_estimates(audit, ["atp", "atp_qk"])
    assert [ax.get_title() for ax in figure.axes] == ["AtP", "AtP, QK fix"] and legend_texts(figure) == ["queries and keys", "values, outputs, MLPs"]
    drawn = lines(figure.axes[0])
    np.testing.assert_allclose(drawn["queries and keys"].get_xydata(), [[0.5, FLOOR]])  # missed whole; the key is small in both
    np.testing.assert_allclose(drawn["values, outputs, MLPs"].get_xydata(), [[0.2, 0.2], [0.3, 0.3], [0.1, 0.05]])
    fits(figure)


def test_cuts_are_drawn_by_width():
    table = pd.DataFrame([{"width": w, "layer": l, "mean": 0.1 * l * w, "low": 0.1 * l * w - 0.05, "high": 0.1 * l * w + 0.05, "n": 9} for w in (1, 5) for l in range(6)])
    figure = draw_cuts(table)
    assert legend_texts(figure) == ["1 layer", "5 layers"]
    for label, w in (("1 layer", 1), ("5 layers", 5)): np.testing.assert_allclose(lines(figure.axes[0])[label].get_ydata(), 0.1 * w * np.arange(6))
    fits(figure)
    assert "n = 9 pairs" in cuts_plate(table, "M").caption and "5: 2.50 at layer 5" in cuts_plate(table, "M").alt


def test_captions_say_metric_direction_pairs_and_model(audit):
    made = [circuit_plate(edge_table(rows_of(WAY)), "M-1"), estimates_plate(audit, "M-1", ["atp", "atp_qk"])]
    for plate, n in zip(made, (6, 1)): assert all(word in plate.caption for word in ("noising", "metric ld", f"n = {n} pairs", "M-1"))
    assert "The 8 strongest" in made[0].caption and "8.0% of the swing" in made[0].caption
    assert "embed at entity to L0.mlp at entity 0.90" in made[0].alt and "L5H3 at final to L6.mlp at final -0.15" in made[0].alt
    assert "AtP 0.00, AtP, QK fix 1.00" in made[1].alt  # ranks of sizes 5 3 1 4 2 and 1 4 2 5 3


def curves(kinds=("nodes", "edges"), keys=tuple(KEPT)):
    """Faithfulness that differs with what, ablation, pairs and size."""
    return pd.DataFrame([{"of": of, "ablation": a, "pairs": p, "share": s, "faithfulness": f, "low": f - 0.1, "high": f + 0.1, "n": 5 + 5 * (p == "held out")}
                         for i, of in enumerate(kinds) for j, (a, p) in enumerate(keys) for s, f in ((0.001, 0.0), (0.1, 0.5 + 0.1 * i + 0.01 * j), (1.0, 1.0))])


def test_faithfulness_is_drawn_as_it_is_in_the_table():
    table = curves()
    figure = draw_faithfulness(table)
    for ax, of in zip(figure.axes, ("nodes", "edges")):
        assert ax.get_title() == f"Circuits of {of}"
        for (ablation, pairs), look in KEPT.items():
            drawn, = [x for x in ax.lines if x.get_label() == f"{ablation}, {pairs}"]
            rows = table[(table.of == of) & (table.ablation == ablation) & (table.pairs == pairs)]
            assert drawn.get_xdata().tolist() == rows.share.tolist() and drawn.get_ydata().tolist() == rows.faithfulness.tolist()
            assert drawn.get_color() == look["color"] and drawn.get_linestyle() == look["ls"]
    assert legend_texts(figure) == [f"{a}, {p}" for a, p in KEPT]
    fits(figure)


def test_faithfulness_is_told_with_its_pairs():
    plate = faithfulness_plate(curves(), "made-up")
    assert "nodes: 5 pairs searched, 10 held out; edges: 5 pairs searched, 10 held out" in plate.caption and "nodes, mean, held out: 0.53 with a tenth" in plate.alt
    alone = faithfulness_plate(curves(["edges"], [("noising", "searched")]), "made-up")
    assert "edges: 5 pairs searched, made-up" in alone.caption and len(alone.figure.axes) == 1
    fits(plate.figure), fits(alone.figure)
