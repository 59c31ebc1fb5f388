"""Run folders with known answers: the effects are written down, not measured."""
from pathlib import Path

import numpy as np
import pandas as pd

from bizzaroworld.files import write_json, write_table
from bizzaroworld.study.runs import Run, open_run

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def planted_run(folder: Path, entity, *, swings=None, final=None, sublayers=None, heads_entity=None, heads_final=None,
                direction="noising", leave_out=(), embedded=True, known=None, kind=None, preferred=None,
                controls=None) -> Run:
    """A finished run whose moves toward the donor run are given as fractions of each pair's TotalSwing.

    entity, final : `pair layer`, resid_pre at the entity and at the final token (default: 1 - entity).
    sublayers : {site: `pair layer`} at both positions; what is not given is 0.1 of the entity's curve.
    heads_entity, heads_final : `pair layer head` (default: two heads, no effect).
    preferred, kind, known : of each pair, whether both answers are preferred (default: all with a swing above 0), first among their
        kind (default: those that are known), first of all (default: all that are preferred).
    controls : {name: `pair layer`}, resid_pre at the entity and at the final token; a pair whose row is NaN has no such control.
    """
    entity = np.asarray(entity, float)
    n, n_layers = entity.shape
    swings = np.linspace(20, 10, n) if swings is None else np.asarray(swings, float)
    final = 1 - entity if final is None else np.asarray(final, float)
    none = np.zeros((n, n_layers, 2))
    z = {"entity": none if heads_entity is None else heads_entity, "final": none if heads_final is None else heads_final}
    sub = {site: 0.1 * entity for site in SITES[1:]} | (sublayers or {})
    resid = {"entity": entity, "final": final}
    ids = [f"pair-{i:02d}" for i in range(n)]
    preferred = (swings > 0) & (True if preferred is None else np.asarray(preferred, bool))
    known = preferred & (True if known is None else np.asarray(known, bool))
    kind = known | preferred & (known if kind is None else np.asarray(kind, bool))
    ld_clean, ld_corrupt = (np.where(preferred, a, b) * swings for a, b in ((0.6, 1.2), (-0.4, 0.2)))

    def rows(experiment, position, site, fractions):
        fractions = np.asarray(fractions, float)
        heads = fractions.shape[2] if fractions.ndim == 3 else None
        where = [(i, l, h) for i in range(n) for l in range(n_layers) for h in (range(heads) if heads else [None])]
        out = pd.DataFrame(where, columns=["pair", "layer", "head"]).astype({"layer": "Int64", "head": "Int64"})
        swing = swings[out.pair]
        clean, corrupt = ld_clean[out.pair], ld_corrupt[out.pair]
        base, sign = (clean, -1) if direction == "noising" else (corrupt, 1)
        effect = sign * np.array([fractions[w if heads else w[:2]] for w in where]) * swing
        return pd.DataFrame({
            "experiment": experiment, "pair_id": [ids[i] for i in out.pair], "category": [f"cat-{i % 4}" for i in out.pair],
            "site": site, "layer": out.layer, "head": out["head"], "position": position, "metric": "ld", "clean": clean,
            "corrupt": corrupt, "patched": base + effect, "effect": effect,
            "recovery": (base + effect - corrupt) / np.where(swing == 0, np.nan, swing), "direction": direction,
            "intervention": "planted"})

    parts = [rows("1", "final", "resid_pre", final), rows("3", "entity", "resid_pre", entity),
             rows("4", "entity", "z", z["entity"]), rows("4F", "final", "z", z["final"])]
    for experiment, position in (("2A", "final"), ("2B", "entity")):
        parts += [rows(experiment, position, s, resid[position] if s == "resid_pre" else sub[s]) for s in SITES]
    effects = pd.concat([p for p in parts if p.experiment[0] not in leave_out], ignore_index=True)
    order = np.argsort(-swings, kind="stable")
    triage = pd.DataFrame({
        "rank": range(1, n + 1), "battery_idx": order, "total_swing": swings[order], "ld_clean": ld_clean[order],
        "ld_corrupt": ld_corrupt[order], "category": [f"cat-{i % 4}" for i in order], "pair_id": [ids[i] for i in order],
        "known": known[order], "preferred": preferred[order], "first_of_kind": kind[order], "first_of_all": known[order], "warnings": ""})
    write_json(folder / "run.json", {
        "model": {"name": "planted", "embedded": embedded, "n_layers": n_layers, "n_heads": z["final"].shape[2], "revision": None},
        "battery_sha256": "0", "options": {"direction": direction}, "n_pairs": n})
    write_table(folder / "triage.csv", triage)
    write_table(folder / "excluded.csv", pd.DataFrame({"pair_id": [], "reason": []}))
    for mode, table in (("A", triage.head(15)), ("B", triage.drop_duplicates("category")), ("C", triage)):
        write_table(folder / f"golden_{mode}.csv", table)
    if controls is not None:
        tables = [rows(e, p, "resid_pre", f).assign(control=name).drop(columns=["recovery", "intervention"]).dropna(subset="effect")
                  for name, f in controls.items() for e, p in (("1", "final"), ("3", "entity"))]
        write_table(folder / "controls.parquet", pd.concat(tables, ignore_index=True))
    write_table(folder / "effects.parquet", effects.sample(frac=1, random_state=0))  # no answer may rest on the order
    return open_run(folder)


def steps(leaves, n_layers=8, before=1.0, after=0.0):
    """A curve for each pair: `before` up to (not including) the layer at which it leaves, then `after`."""
    return np.where(np.arange(n_layers) < np.asarray(leaves)[:, None], before, after)
