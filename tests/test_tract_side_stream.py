"""The order of streams, on a GPU that is a list of what it is told; on a real one see `test_tract_cuda.py`."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tract import TrActLinear, layers, ops, side_stream
from tract.side_stream import beside, is_allowed, join


class _Gpu(list):
    """What it has been told; also its tensors and, by name, its streams."""

    is_cuda, device, capturing = True, "cuda:1", False

    def __init__(self):
        self.current = ["main"]

    def do(self, what):
        self.append(f"{what} on {self.current[-1]}")

    def record_stream(self, stream):
        self.append(f"memory is in use on {stream.name}")

    def named(self, name):
        waits = lambda other: self.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=waits)

    @contextmanager
    def stream(self, stream):
        self.current.append(stream.name)
        try:
            yield
        finally:
            self.current.pop()

    @contextmanager
    def device_of(self, tensor):
        self.looked_at = tensor.device
        yield


@pytest.fixture
def gpu(monkeypatch):
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.named(gpu.current[-1]))
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "device_of", gpu.device_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(side_stream, "_side_stream", lambda device: gpu.named("side"))
    return gpu


def _forward_and_backward(gpu, wanted=True):
    with beside(gpu, wanted):
        gpu.do("factor")
    gpu.do("network")
    join(gpu, wanted)
    gpu.do("solve")


def test_the_side_stream_waits_before_and_the_current_one_after(gpu):
    _forward_and_backward(gpu)
    assert gpu == [
        "side waits for main",
        "memory is in use on side",
        "factor on side",
        "network on main",
        "main waits for side",
        "memory is in use on main",
        "solve on main",
    ]


IN_LINE = ["factor on main", "network on main", "solve on main"]


def test_a_graph_capture_stays_on_its_stream(gpu):
    gpu.capturing = True
    _forward_and_backward(gpu)
    assert gpu == IN_LINE
    assert gpu.looked_at == "cuda:1"  # where the capture is looked for


def test_nothing_is_beside_unless_wanted(gpu):
    _forward_and_backward(gpu, wanted=False)
    assert gpu == IN_LINE


def test_on_the_cpu_there_is_nothing_beside(gpu):
    with beside(torch.zeros(1), wanted=True):
        gpu.do("factor")
    join(torch.zeros(1), wanted=True)
    assert gpu == ["factor on main"]


def test_an_error_beside_leaves_the_stream_as_it_was(gpu):
    with pytest.raises(KeyError), beside(gpu, wanted=True):
        raise KeyError
    gpu.do("network")
    assert gpu[-1] == "network on main"


def test_hooks_on_saved_tensors_and_compiled_code_allow_nothing_beside():
    assert is_allowed()
    with torch.autograd.graph.save_on_cpu():
        assert not is_allowed()
    seen = []
    checkpoint(lambda x: (seen.append(is_allowed()), x)[1], torch.ones(1, requires_grad=True), use_reentrant=False)
    assert seen == [False]
    assert torch.compile(lambda x: x + is_allowed(), backend="eager")(torch.zeros(1)) == 0
    assert torch.func.grad(lambda x: x.sum() * is_allowed())(torch.ones(1)) == 1


def test_the_layer_makes_its_factor_beside_and_joins_before_the_solve(monkeypatch):
    order = []

    @contextmanager
    def seen_beside(source, wanted):
        order.append(f"begin {wanted}")
        yield
        order.append("end")

    monkeypatch.setattr(side_stream, "beside", seen_beside)
    monkeypatch.setattr(ops, "join", lambda factor, wanted: order.append(f"join {wanted}"))
    for name in ("factor_op", "solve_op"):
        where = layers if name == "factor_op" else ops
        operation = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, o=operation, n=name: (order.append(n), o(*a))[1])
    layer = TrActLinear(3, 2)
    layer(torch.randn(9, 3)).sum().backward()
    assert order == ["begin True", "factor_op", "end", "join True", "solve_op"]
