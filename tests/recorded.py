"""A recorder on the CPU: a list of operations in place of a CUDA graph, repeated without any Python of the step."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tract import finite
from tract.finite import recorded

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
    """Layers ask nothing in a recording."""
    return patch("tract.finite._is_captured", return_value=True)


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in _ASK:
            raise RuntimeError("operation not permitted when stream is capturing")
        with recorded() as asked:
            result = func(*args, **(kwargs or {}))
        finite._recorded[-1].extend(asked)
        self.done.append((func, args, kwargs or {}, result, asked))
        return result

    @torch.no_grad()
    def repeat(self):
        for func, args, kwargs, before, asked in self.done:
            with recorded() as asked_now:  # within an operation of ours
                result = func(*args, **kwargs)
            for (old, _), (new, _) in zip(asked, asked_now, strict=True):
                old.copy_(new)
            if any(returned.alias_info for returned in func._schema.returns):
                continue  # a view, or done in place
            for old, new in zip(_tensors(before), _tensors(result), strict=True):
                old.copy_(new)


def _tensors(result):
    parts = result if isinstance(result, tuple | list) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]
