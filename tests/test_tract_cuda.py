"""What can only be seen on a CUDA device: no waiting of the host, graph capture, background errors."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

from tests import reference
from tests.tract_layers import A_FEW, LAYERS, error, make
from tract import NonFiniteError, TrAct, accumulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.float32, torch.float64]


def _on_device(name, dtype=torch.float32):
    layer, x, direction = make(name, dtype)
    return TrAct(layer.cuda(), 0.1), x.cuda(), direction.cuda()


def _step(layer, x, direction):
    (layer(x) * direction).sum().backward()


@contextmanager
def no_waiting():
    """Any operation that makes the host wait for the device is an error; bringing a layer there is such a one."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_on_the_device_follows_the_formula(name):
    layer, x, direction = _on_device(name, torch.float64)
    _step(layer, x, direction)
    plain = make(name)[0]
    plain.load_state_dict(layer.state_dict())
    assert error(layer.weight.grad.cpu(), reference.tract_gradient(plain, x.cpu(), direction.cpu(), 0.1)) < 1e-10


@pytest.mark.parametrize("name", A_FEW)
def test_the_host_never_waits_for_the_device(name):
    layer, x, direction = _on_device(name)
    with no_waiting():
        for _ in range(3):
            _step(layer, x, direction)
        with accumulate(layer):
            _step(layer, x, direction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", A_FEW)
def test_a_captured_graph_replays_the_step_on_new_data(name, dtype):
    layer, x, direction = _on_device(name, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(layer, x, direction)
    torch.cuda.synchronize()
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(layer, x, direction)
    x.normal_()
    graph.replay()
    captured = layer.weight.grad.clone()
    layer.zero_grad()
    _step(layer, x, direction)
    assert error(captured, layer.weight.grad) < 1e-4


@pytest.mark.parametrize("name", ["linear", "linear few rows"])
def test_non_finite_input_raises_by_the_check_after_its_answer_has_arrived(name):
    layer, x, direction = _on_device(name)
    _step(layer, x / 0, direction)
    assert not layer.weight.grad.isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match="expected finite inputs"):
        _step(layer, x, direction)


def test_working_memory_stays_far_below_an_unfolded_copy():
    """A stem with 7 x 7 kernels: unfolded, its input is twelve times as large, in float64 twenty-four times."""
    x = torch.randn(64, 3, 224, 224, device="cuda")

    def peak(layer):
        torch.cuda.reset_peak_memory_stats()
        layer(x).sum().backward()
        return torch.cuda.max_memory_allocated()

    layer = nn.Conv2d(3, 64, 7, stride=2, padding=3).cuda()
    plain, wrapped = peak(layer), peak(TrAct(layer))
    unfolded = 8 * 64 * 112 * 112 * 147
    assert wrapped - plain < unfolded // 2
