"""What a sweep cannot avoid: operations and bytes, counted; and what the machine can do, measured.

Counted as unavoidable, for exact results and a causal Gemma-like model (one multiply and add are two operations):

- One base and one donor run of each pair, and for each distinct intervention the positions from the first edited one
  on, in the blocks from the first edited one on. Everything before equals the base run.
- An intervention on tokens before the first one that differs costs nothing: the donor's values are there already.
- In the first block of an intervention, only what its edit changes. `resid_pre`: queries, keys and values of the edited
  position, attention, its output projection and the MLP from there on. `z`, `attn_out`, `resid_mid`: the output
  projection (for `z`) and the MLP at the edited position. `mlp_out` and `resid_post`: nothing.
- In the last block, keys and values at all these positions, and everything else at the final one only.
- Two columns of the unembedding for each run.

Matrix products and attention count; norms, activation functions, rotations and sums do not (they are some percent of
the operations, and bound by memory). Bytes: the weights of all blocks read once, since base, donor and patched runs
could go through a block together, plus the two columns. The floor is the larger of operations / (operations per second
of a matrix product) and bytes / (bytes per second of a copy). No program reaches it; the fraction says how far there
is to go.
"""
import time
from os.path import commonprefix

import torch

from bizzaroworld.patch.passes import AFTER_MLP, rows_of
from bizzaroworld.patch.sweep import _same_as


def best_of(run, repeats: int = 30) -> float:
    """The shortest of several times, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(model, rows: int = 512) -> dict[str, float]:
    """Operations per second of the MLP's matrix product, with `rows` tokens in the batch, and bytes per second of a copy."""
    d, wide = model.d_model, model.shape.d_mlp
    a, b, big = torch.randn(rows, d), torch.randn(d, wide), torch.randn(2**24)
    to = torch.empty_like(big)
    return {"operations_per_second": 2 * rows * d * wide / best_of(lambda: torch.mm(a, b), 300),
            "bytes_per_second": 2 * 4 * big.numel() / best_of(lambda: to.copy_(big))}


class Costs:
    """Operations of the parts of a block, for one token."""
    def __init__(self, shape):
        inner = shape.n_heads * shape.d_head
        self.heads = 4 * inner  # for each query: scores and mixture, for each key that it sees
        self.q = self.o = 2 * shape.d_model * inner
        self.kv = 4 * shape.d_model * shape.n_kv_heads * shape.d_head
        self.mlp = 6 * shape.d_model * shape.d_mlp

    def attention(self, length: int, tail: int) -> int:
        """Scores and mixtures of the last `tail` of `length` positions."""
        return self.heads * sum(range(length - tail + 1, length + 1))

    def block(self, length: int, tail: int) -> int:
        return tail * (self.q + self.kv + self.o + self.mlp) + self.attention(length, tail)

    def last(self, length: int, tail: int) -> int:
        return tail * self.kv + self.q + self.o + self.mlp + self.heads * length

    def first(self, row, length: int, last: bool) -> int:
        """The first block of a row: what its writes there change."""
        sites = {w.site for w in row.writes}
        edited = {w.position for w in row.writes}
        if sites <= set(AFTER_MLP): return 0
        if sites <= {"z", "attn_out", "resid_mid"}:
            return sum((self.o if "z" in sites else 0) + self.mlp for p in edited if not last or p == -1)
        queries = 1 if last else row.tail
        return len(edited) * (self.q + self.kv) + queries * (self.o + self.mlp) + self.attention(length, queries)


def operations(model, pairs, interventions) -> int:
    """The operations that a sweep of single edits over these pairs cannot avoid."""
    cost, layers = Costs(model.shape), model.n_layers
    runs = [2 * ((layers - 1) * cost.block(len(p.clean_ids), len(p.clean_ids)) + cost.last(len(p.clean_ids), len(p.clean_ids)))
            for p in pairs]
    shared = [len(commonprefix([p.clean_ids, p.corrupt_ids])) for p in pairs]
    rows = rows_of(model.shape, pairs, pairs, list(dict.fromkeys(_same_as(model, i) for i in interventions)), shared)
    patched = [cost.first(r, n, r.layer == layers - 1) + (r.layer < layers - 1) *
               ((layers - 2 - r.layer) * cost.block(n, r.tail) + cost.last(n, r.tail))
               for r in rows for n in [len(pairs[r.pair].clean_ids)]]
    return sum(runs) + sum(patched) + 4 * model.d_model * (len(rows) + 2 * len(pairs))


def weight_bytes(model) -> int:
    """The weight matrices of all blocks, and two columns of the unembedding."""
    cost, each = Costs(model.shape), model.readout.head.weight.element_size()
    return each * (model.n_layers * (cost.q + cost.kv + cost.o + cost.mlp) // 2 + 2 * model.d_model)


def floor(model, pairs, interventions, seconds: float, can: dict[str, float]) -> dict:
    """The floor of a task, and the fraction of it that was reached in `seconds`."""
    ops, size = operations(model, pairs, interventions), weight_bytes(model)
    least = max(ops / can["operations_per_second"], size / can["bytes_per_second"])
    return {"operations": ops, "weight_bytes": size, "floor_seconds": round(least, 5),
            "bound_by": "operations" if least > size / can["bytes_per_second"] else "bytes",
            "fraction_of_floor": round(least / seconds, 3)}
