"""What a folder keeps: whole files of finite numbers, of one process at a time."""
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bizzaroworld.scale.folders import LEFT_OUT, BusyError, held, is_done, not_finite, note_left_out, pair_file, read_pair
from bizzaroworld.files import replacing, write_table


def rows(pair_id="p", n=40, seed=0):
    numbers = np.random.default_rng(seed).normal(size=(3, n))
    return pd.DataFrame({"pair_id": pair_id, "intervention": [f"z L{i} @final" for i in range(n)], **dict(zip(("clean", "corrupt", "patched"), numbers)), "recovery": np.nan})


def test_what_is_written_is_read_and_counts_as_done(tmp_path):
    assert not is_done(tmp_path, "p") and read_pair(tmp_path, "p") is None
    write_table(pair_file(tmp_path, "p"), rows())
    assert is_done(tmp_path, "p") and not is_done(tmp_path, "p", "controls/unrelated"), "an undefined recovery is no fault"
    pd.testing.assert_frame_equal(read_pair(tmp_path, "p"), rows(), check_exact=True)


def test_another_pairs_rows_or_none_are_not_this_ones(tmp_path):
    write_table(pair_file(tmp_path, "p"), rows("q"))
    write_table(pair_file(tmp_path, "none"), rows("none").head(0))
    assert not is_done(tmp_path, "p") and not is_done(tmp_path, "none")


@pytest.mark.parametrize("column", ["clean", "corrupt", "patched"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named_and_do_not_count(tmp_path, column, value):
    bad = rows()
    bad.loc[7, column] = value
    assert "1 of 40 rows, first z L7 @final" in not_finite(bad) and not_finite(rows()) == ""
    write_table(pair_file(tmp_path, "p"), bad)
    assert not is_done(tmp_path, "p")


def test_an_estimated_size_needs_no_patched_run(tmp_path):
    sizes = rows().assign(patched=np.nan, effect=1.0)
    assert not_finite(sizes) == "" and not_finite(sizes.drop(columns="effect")) and not_finite(sizes.assign(effect=np.inf))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bits_change_no_number(tmp_path, where, bit):
    """Wherever a bit flips, the file is missing, or what it says of numbers is what was written."""
    path, whole = pair_file(tmp_path, "p"), rows()
    write_table(path, whole)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    found = read_pair(tmp_path, "p")
    if found is not None: assert all(found[name].equals(whole[name]) for name in whole if name in found)


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_torn_file_counts_as_missing(tmp_path, keep):
    write_table(pair_file(tmp_path, "p"), rows())
    pair_file(tmp_path, "p").write_bytes(pair_file(tmp_path, "p").read_bytes()[:keep])
    assert not is_done(tmp_path, "p")


HOLD = "import sys, time\nfrom bizzaroworld.scale.folders import held\nwith held(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    """What a killed process left half-written goes when the folder is taken up again; everything else stays."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    half, mine = tmp_path / "pairs" / f".p.parquet.{other.pid}.tmp", tmp_path / ".notes.tmp"
    half.parent.mkdir()
    (tmp_path / "run.json").write_text("{}")
    half.write_text("cut off"), mine.write_text("kept")
    with pytest.raises(BusyError, match="Another process is working on .*--out"):
        with held(tmp_path): pass
    assert half.exists(), "it may be the other process's"
    other.send_signal(signal.SIGKILL)
    other.wait()
    with held(tmp_path), held(tmp_path): assert not half.exists() and mine.exists()


def test_a_name_that_is_cleared_away_is_the_name_that_files_have_until_they_are_whole(tmp_path):
    with replacing(tmp_path / "a b.parquet") as temporary:
        temporary.write_text("half")
        with held(tmp_path): assert temporary.exists(), "a folder that holds no run is not ours to clear"
        (tmp_path / "grid.json").write_text("{}")
        with held(tmp_path): assert not temporary.exists()
        temporary.write_text("whole")


def test_what_is_left_out_is_named_until_nothing_is(tmp_path):
    note_left_out(tmp_path, {"pairs": {"1": "not finite"}, "controls/unrelated": {"p,\n": "why"}})
    table = pd.read_csv(tmp_path / LEFT_OUT, dtype=str)
    assert table.values.tolist() == [["1", "pairs", "not finite"], ["p,\n", "controls/unrelated", "why"]]
    note_left_out(tmp_path, {"pairs": {}})
    note_left_out(tmp_path, {})
    assert not (tmp_path / LEFT_OUT).exists()


@pytest.mark.parametrize("pair_id", ["../../above", "/etc/above", "dates/one", "a: b?", "back\\slash", "%2F", "o\0"])
def test_whatever_a_pair_is_called_its_file_stays_in_the_folder(tmp_path, pair_id):
    path = pair_file(tmp_path, pair_id)
    assert path.parent == tmp_path / "pairs" and path.resolve().parent == path.parent.resolve()
    assert path != pair_file(tmp_path, pair_id.replace("/", "%2F") + "x")
    assert pair_file(tmp_path, "geo-a b").name == "geo-a b.parquet" and pair_file(tmp_path, "%2F") != pair_file(tmp_path, "/")


