"""A second device that is none: tensors on the CPU that say `cuda:0`, and an error wherever two devices meet that a GPU would not let meet."""
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

THERE = torch.device("cuda:0")
MIXED = {"copy_", "__getitem__", "index", "is_floating_point", "numel", "dim", "size"}  # what may take tensors of both: copies, and indices on the CPU
OFF = {"numpy", "__array__"}  # what only the CPU has


class MeetError(AssertionError):
    "Tensors of two devices in one call."


def is_there(x: Tensor) -> bool: return getattr(x, "_there", False)


def put(module: torch.nn.Module) -> torch.nn.Module:
    """All of a module, there."""
    for x in (*module.parameters(), *module.buffers()): x._there = True
    return module


def _is_device(x) -> bool: return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cuda", "cpu"))


def _here(x): return torch.device("cpu") if _is_device(x) else x


class Elsewhere(TorchFunctionMode):
    """While it lasts, `device="cuda"` makes such tensors, and what is made of them is one. `calls` counts those with one of them."""
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if is_there(x)]
        if func == Tensor.device.__get__: return THERE if there else func(*args)
        if func == Tensor.is_cuda.__get__: return bool(there)
        self.calls += bool(there)
        if there and name in OFF: raise MeetError(f"{name} of a tensor that is not on the CPU")
        if there and name not in MIXED and name != "to" and (here := [x for x in tensors if not is_there(x) and x.ndim]):
            if name != "__setitem__" or any(not is_there(x) for x in tree_leaves(args[2:]) if isinstance(x, Tensor) and x.ndim): raise MeetError(f"{name} of {[tuple(x.shape) for x in there]} there and {[tuple(x.shape) for x in here]} here")
        asked = next((x for x in (*args[1:], *kwargs.values()) if _is_device(x)), None)
        goal = bool(there) if asked is None else torch.device(asked).type == "cuda"
        if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], Tensor): goal = is_there(args[1])
        if name == "cpu": goal = False
        elif name == "cuda": func, goal = Tensor.clone, True
        elif name in MIXED | {"__setitem__"} and tensors: goal = is_there(tensors[0])
        out = func(*map(_here, args), **{k: _here(v) for k, v in kwargs.items()})
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or is_there(x) == goal: continue
            if any(x is y for y in tensors):  # it was moved, and nothing was to be copied on the CPU
                moved = x.clone()
                moved._there = goal
                return moved
            x._there = goal
        return out
