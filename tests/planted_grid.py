"""Tables of a grid of methods whose effects are known because they were put there."""
import itertools

import numpy as np
import pandas as pd

LESS = {"kl", "rank"}  # metrics of which less is better; written down here a second time, so that a slip in the package is seen


def plant(support, corruption="STR", metric="ld", direction="denoising", window=1, site="mlp_out", position="final", wording="w", control="",
          task="t", clean=4.0, corrupt=0.0, pairs=None):
    """A table with known support: `pair layer` or `pair layer head`, in the metric's unit, positive where the clean answer is supported."""
    support = np.asarray(support, float)
    n, sign = len(support), -1 if metric in LESS else 1
    if metric in LESS: clean, corrupt = np.asarray(corrupt), np.asarray(clean)  # the clean run has the small value
    clean, corrupt = np.broadcast_to(clean, n).astype(float), np.broadcast_to(corrupt, n).astype(float)
    rows = []
    for i, *place in itertools.product(*map(range, support.shape)):
        value = sign * support[(i, *place)]
        patched = corrupt[i] + value if direction == "denoising" else clean[i] - value
        rows.append((task, f"p{i}" if pairs is None else pairs[i], wording, corruption, metric, direction, window, site, place[0],
                     place[1] if len(place) > 1 else pd.NA, position, clean[i], corrupt[i], patched, control))
    columns = "task pair_id wording corruption metric direction window site layer head position clean corrupt patched control".split()
    return pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})


def alike(means, n=20):
    """The same effects in each of `n` pairs."""
    return np.repeat(np.asarray(means, float)[None], n, axis=0)


def at_z(z, shape=(8, 4), place=(5, 1), seed=0):
    """Effects of components, the one at `place` exactly `z` standard deviations from the mean of all, the others well within 2."""
    size, rng = int(np.prod(shape)), np.random.default_rng(seed)
    others = rng.uniform(-1, 1, size - 1)
    others = (others - others.mean()) / others.std()
    out = np.sign(z) * abs(z) * np.sqrt(size / (size - 1 - z ** 2))
    return np.insert(others, np.ravel_multi_index(place, shape), out).reshape(shape) * 0.1


def grid(profile, corruption=("STR", "GN"), metric=("ld", "prob", "kl"), direction=("noising", "denoising"), window=(1, 3), wording=("a", "b"), n=4):
    """A full factorial; `profile(corruption, metric, direction, window, wording)` gives the effects of a combination."""
    names = ("corruption", "metric", "direction", "window", "wording")
    return pd.concat([plant(alike(profile(**dict(zip(names, levels))), n), **dict(zip(names, levels)))
                      for levels in itertools.product(corruption, metric, direction, window, wording)], ignore_index=True)
