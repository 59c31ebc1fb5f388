"""The committed audit of the battery under real tokenizers: its sums are right, and it can be repeated."""
import os
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from bizzaroworld.battery.audit import audit
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.battery.tokens import REASONS
from bizzaroworld.files import data_path

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED, EMBEDDED = ("gemma-1", "gemma-3", "gpt2", "pythia"), ("bizzaro-nano", "bizzaro-micro")
KEPT = ["battery_idx", "pair_id", "category", "usable", "reason", "message", "replaced_by"]


def committed(name): return pd.read_csv(data_path("drift", f"{name}.csv"), keep_default_na=False)


def tokenizer(name):
    if name in EMBEDDED: return AutoTokenizer.from_pretrained(data_path("models", name), local_files_only=True)
    folder = Path(os.environ.get("BIZZARO_TOKENIZERS", ROOT.parent / "shared" / "tokenizers")) / name
    if not folder.is_dir(): pytest.skip(f"no tokenizer {name} (set BIZZARO_TOKENIZERS to a folder that holds it)")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_every_tokenizer_has_the_whole_battery():
    table = committed("audit")
    assert tuple(dict.fromkeys(table.tokenizer)) == PUBLISHED + EMBEDDED
    ids = [pair.id for pair in load_battery()]
    for _, rows in table.groupby("tokenizer"): assert rows.pair_id.tolist() == ids and rows.battery_idx.tolist() == list(range(60))
    assert set(table.reason[~table.usable]) <= set(REASONS) and (table.reason[table.usable] == "").all()
    spares = {pair.id: pair.category for pair in load_spares()}
    stepped_in = table[~table.replaced_by.isin(["", "none"])]
    assert (stepped_in.replaced_by.map(spares) == stepped_in.category).all()
    assert not stepped_in.duplicated(["tokenizer", "replaced_by"]).any()


def test_the_summary_counts_the_audit():
    table, summary = committed("audit"), committed("summary").set_index("tokenizer")
    for name, rows in table.groupby("tokenizer"):
        replaced = int((~rows.replaced_by.isin(["", "none"])).sum())
        counts = {"pairs": len(rows), "usable": int(rows.usable.sum()), "dropped": int((~rows.usable).sum()), "replaced": replaced,
                  "selected": int(rows.usable.sum()) + replaced}
        assert summary.loc[name, list(counts)].to_dict() == counts, name
        for part in filter(None, summary.reasons[name].split(", ")):
            reason, n = part.split()
            assert (rows.reason == reason).sum() == int(n), name


@pytest.mark.parametrize("name", PUBLISHED + EMBEDDED)
def test_the_audit_can_be_repeated(name):
    found = audit({name: tokenizer(name)}, load_battery(), load_spares())
    table = committed("audit")
    pd.testing.assert_frame_equal(found.table[KEPT], table.loc[table.tokenizer == name, KEPT].reset_index(drop=True), check_dtype=False)
    kept = committed("summary").set_index("tokenizer").loc[name]
    assert found.summary().set_index("tokenizer").loc[name].astype(str).to_dict() == kept.astype(str).to_dict()
