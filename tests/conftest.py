"""What all tests share: no network, repeatable hypothesis, where the repository is."""
import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


# The files that take longest. Side by side with others they come first: one that begins last keeps everybody waiting.
LONG = ("test_wheel.py", "scale/test_shares.py", "scale/test_faults.py", "planted/test_planted_scoreboard.py", "patch/test_families.py", "paper/test_report.py", "test_study.py", "test_docs.py", "zoo/test_micro.py", "zoo/test_changed.py", "zoo/test_embedded.py",
        "lookup/test_hypotheses.py", "planted/test_lookups.py", "commands/test_lookup_run.py", "commands/test_features_run.py", "zoo/test_people_model.py", "tasks/test_ability.py", "battery/test_chat.py", "model/test_gemma.py", "replication/test_claims.py")


def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist with `--no-loadscope-reorder`, the long files first; otherwise the order is as it was."""
    if not hasattr(config, "workerinput"): return
    root = Path(__file__).resolve().parent
    place = {root / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tokenizer_folders(repo) -> dict[str, Path]:
    """Folders of real tokenizers that are not ours to ship, by name; the test is skipped where there are none."""
    root = Path(os.environ.get("BIZZARO_TOKENIZERS", repo.parent / "shared" / "tokenizers"))
    folders = {p.name: p for p in sorted(root.glob("*")) if p.is_dir()} if root.is_dir() else {}
    if not folders:
        pytest.skip("no real tokenizers here: set BIZZARO_TOKENIZERS to a folder with one folder for each")
    return folders


@pytest.fixture(scope="session")
def gemma():
    """Gemma 3 270M, loaded once for all tests: it takes a while and 1.5 GB."""
    from bizzaroworld.model.load import load_model
    from bizzaroworld.model.names import PACKAGED, parts_of
    if not parts_of(PACKAGED["gemma-3-270m"]): pytest.skip(f"Gemma 3 270M is not installed: {PACKAGED['gemma-3-270m'].install}")
    return load_model("gemma-3-270m", device="cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in {"localhost", "127.0.0.1", "::1"}:
            raise OSError(f"tests run offline, but this one connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
