"""A recorder on the CPU: a list of operations in place of a CUDA graph, repeated without any Python of the step."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ASK = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Recorder:
    """In place of the one in ``step_graph.py``; counts what it did."""

    device_type = "cpu"
    runs = recordings = replays = 0

    def __init__(self, device):
        Recorder.runs = Recorder.recordings = Recorder.replays = 0

    def run(self, work):
        Recorder.runs += 1
        work()

    def record(self, work):
        """Other than on a GPU it is run as it is recorded; so the first replay has nothing left to do."""
        Recorder.recordings += 1
        operations = _Operations()
        with operations, _silent():
            work()
        is_done = True

        def replay():
            nonlocal is_done
            Recorder.replays += 1
            if not is_done:
                with _silent():
                    operations.repeat()
            is_done = False

        return replay


def _silent():
    """Layers check nothing in a recording."""
    return patch("tract.ops.require")


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in _ASK:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def repeat(self):
        for func, args, kwargs, before in self.done:
            result = func(*args, **kwargs)
            if any(returned.alias_info for returned in func._schema.returns):
                continue  # a view, or done in place
            for old, new in zip(_tensors(before), _tensors(result), strict=True):
                old.copy_(new)


def _tensors(result):
    parts = result if isinstance(result, tuple | list) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]
