"""Recipes that fail as asked, and need no model; here, where other processes find them too."""
import os
import signal
from pathlib import Path

import pandas as pd


def lengths(model):
    """A recipe that needs no model: how many tokens a pair has, and which process counted."""
    return lambda unit: pd.DataFrame({"pair_id": [tp.id for tp in unit], "patched": [float(len(tp.clean_ids)) for tp in unit], "pid": os.getpid()})


def failing(model, bad, error=RuntimeError("no such luck")):
    """A recipe that cannot take some pairs."""
    def sweep(unit):
        if any(tp.id in bad for tp in unit): raise error
        return lengths(model)(unit)
    return sweep


def killing(model, bad, folder, times):
    """A recipe whose process dies over some pairs, so many times."""
    def sweep(unit):
        before = len(list(Path(folder).glob("died-*")))
        if any(tp.id in bad for tp in unit) and before < times:
            (Path(folder) / f"died-{before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return lengths(model)(unit)
    return sweep


class Unpicklable(Exception):
    def __init__(self, one, two): super().__init__(f"{one} and {two}")


def strange(model):
    def sweep(unit): raise Unpicklable("this", "that")
    return sweep
