"""Estimators and path effects on planted circuits: each finds what theory says that it finds, and misses what theory says that it misses."""
import pytest

from bizzaroworld.patch.interventions import Edit
from bizzaroworld.planted.scoreboard import as_edge_scores, as_scores, edges_of, places, score, scoreboard
from bizzaroworld.planted.truth import truth_of
from bizzaroworld.planted.variants import VARIANTS, plant

SITES = {"nodes": ("z", "mlp_out"), "inputs": ("q", "k", "v")}
MENDED_BY_GRADDROP = {"flat", "cancelled"}  # where the gradient through one layer cancels another's


def missed(name, kind, qk_fix=False, grad_drop=False):
    """What an estimate with these parts must miss: what a gradient is blind for, less what each part mends."""
    truth = truth_of(VARIANTS[name])
    blind = set(truth.blind) if not (grad_drop and name in MENDED_BY_GRADDROP) else set()
    return {n for n in getattr(truth, kind) if n in blind and not (qk_fix and n.site in ("q", "k"))}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def family(request):
    return {name: plant(name, n=2, family=request.param) for name in VARIANTS}


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("parts", [{}, {"qk_fix": True}, {"grad_drop": True}, {"qk_fix": True, "grad_drop": True}], ids=lambda p: "+".join(p) or "atp")
def test_an_estimator_fails_exactly_where_theory_says(family, kind, parts):
    attribution, star = (pytest.importorskip(f"bizzaroworld.circuits.{room}") for room in ("attribution", "atp_star"))
    def method(model, pairs):
        if not parts: return as_scores(attribution.attribution(model, pairs, sites=SITES[kind]).to_frame(), pairs)
        return as_scores(star.atp_star(model, pairs, sites=SITES[kind], **{"qk_fix": False, "grad_drop": False} | parts).to_frame(), pairs)
    for _, row in scoreboard({"estimate": method}, family.values(), kind).iterrows():
        assert (set(row.missed), row.extra) == (missed(row.variant, kind, **parts), ()), row.variant


def test_integrated_gradients_see_what_one_gradient_does_not(family):
    attribution = pytest.importorskip("bizzaroworld.circuits.attribution")
    def method(model, pairs): return as_scores(attribution.attribution(model, pairs, method="ig", sites=SITES["nodes"]).to_frame(), pairs)
    assert scoreboard({"ig": method}, [family[name] for name in ("flat", "saturated", "spread")]).exact.all()


@pytest.mark.parametrize("name", VARIANTS)
def test_path_effects_find_every_edge_that_does_something_alone(family, name):
    paths = pytest.importorskip("bizzaroworld.circuits.paths")
    p, truth, found = family[name], truth_of(VARIANTS[name]), {}
    universe = edges_of(p.model, p.pairs[:1])
    for at in places(p.pairs[0])[-4:]:  # tokens before the entity are the same in both prompts
        asked = [e for e in paths.edges(p.model) if at == "final" or str(e[-1]) != "logits"]
        table = paths.path_effects(p.model, p.pairs[:1], asked, sender_at=at, receiver_at=at).to_frame()
        found |= as_edge_scores(table, p.model, at)
    s = score(found, truth.edges, universe)
    assert not s.extra and set(s.missed) == {e for e in truth.edges if e in truth.masked}


def test_what_must_be_missed_is_told_apart():
    """Written out once by hand, so that a slip in the rule above is seen."""
    q, k = Edit("q", 4, "final", 2), Edit("k", 4, "entity", 1)
    assert missed("saturated", "inputs") - missed("saturated", "inputs", qk_fix=True) == {q} and missed("backup", "inputs") - missed("backup", "inputs", qk_fix=True) == {q, k}
    assert missed("saturated", "nodes", True, True) == {Edit("mlp_out", 1, "entity"), Edit("z", 3, "final", 1)}
    assert missed("flat", "nodes") == set(truth_of(VARIANTS["flat"]).nodes) and missed("flat", "nodes", grad_drop=True) == set()
