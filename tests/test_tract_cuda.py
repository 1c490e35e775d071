"""What can only be seen on a CUDA device: waiting of the host, streams, graph capture, memory, the Triton kernels."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests import reference
from tests.tract_layers import A_FEW, LAYERS, error, make
from tract import NonFiniteError, TrAct, accumulate, finite, gpu_moment, side_stream
from tract.ops import second_moment_op
from tract.second_moment import Geometry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
DTYPES = [torch.float32, torch.float64]
MANY_ROWS = [name for name in LAYERS if "few rows" not in name and "one row" not in name]


@pytest.fixture(autouse=True)
def _plain_kernels_are_exact_and_repeat():
    """So that what is seen is ours: convolutions use tf32 unless told otherwise."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
        yield


def _on_device(name, dtype=torch.float32, device="cuda"):
    layer, x, direction = make(name, dtype)
    return TrAct(layer.to(device), 0.1), x.to(device), direction.to(device)


def _step(layer, x, direction):
    (layer(x) * direction).sum().backward()


def _gradient(layer, x, direction):
    layer.zero_grad()
    _step(layer, x, direction)
    return layer.weight.grad.clone()


@contextmanager
def no_waiting():
    """Any operation that makes the host wait for the device is an error. Making tensors on the device may wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _plain_gradient(layer, x, direction, dtype=None):
    """The layer's own weight gradient, by the device's kernels."""
    weight = layer.weight.detach().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        (layer._plain_forward(x, weight, layer.bias) * direction).sum().backward()
    return weight.grad.cpu()


# Gradients


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_in_float64_follows_the_formula(name):
    layer, x, direction = _on_device(name, torch.float64)
    _step(layer, x, direction)
    plain = make(name)[0]
    plain.load_state_dict(layer.state_dict())
    assert error(layer.weight.grad.cpu(), reference.tract_gradient(plain, x.cpu(), direction.cpu(), 0.1)) < 1e-10


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MANY_ROWS)
def test_gradient_is_the_plain_kernels_times_the_inverse_in_float32_and_under_autocast(name, dtype):
    layer, x, direction = _on_device(name)
    expected = reference.preconditioned(
        _plain_gradient(layer, x, direction, dtype), reference.second_moment(layer.cpu(), x.cpu()), 0.1
    )
    layer.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        actual = _gradient(layer, x, direction)
    assert actual.dtype == torch.float32
    assert error(actual.cpu(), expected) < 3e-6


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in MANY_ROWS])
def test_gradient_of_few_rows_in_float32_follows_the_formula(name):
    layer, x, direction = _on_device(name)
    actual = _gradient(layer, x, direction).cpu()
    assert error(actual, reference.tract_gradient(layer.cpu(), x.cpu(), direction.cpu(), 0.1)) < 3e-6


# Second moments

SHAPES = {
    "CIFAR stem": (lambda: nn.Conv2d(3, 64, 3, padding=1), (128, 3, 32, 32)),
    "ViT tokens": (lambda: nn.Linear(48, 384), (128, 64, 48)),
    "ImageNet stem": (lambda: nn.Conv2d(3, 64, 7, 2, 3), (32, 3, 224, 224)),
    "DeiT-S embedding": (lambda: nn.Conv2d(3, 384, 16, 16), (64, 3, 224, 224)),
    "DeiT-B embedding": (lambda: nn.Conv2d(3, 768, 16, 16), (64, 3, 192, 192)),
}
everywhere = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(params=["triton", "torch"])
def way(request, monkeypatch):
    """Both ways to a second moment: the Triton kernels, and torch's own operations, as where there is no Triton."""
    if request.param == "torch":
        monkeypatch.setattr(gpu_moment, "supports", lambda x, geometry: False)
    elif torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the device does not multiply tf32")
    else:
        assert gpu_moment.supports(torch.zeros(1, 1, device="cuda"), TrAct(nn.Linear(1, 1))._geometry())
    return request.param


def second_moment(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    return second_moment_op(x, geometry.numbers(), 0.1)


def _moments(layer, x):
    """X^T X of a layer with many rows and that in float64, image by image."""
    n = layer.weight[0].numel()
    expected = torch.zeros(n, n, dtype=torch.float64, device="cuda")
    for part in x.split(8):
        rows = part.double().reshape(-1, n)
        if isinstance(layer, nn.Conv2d):
            options = {"padding": layer.padding, "stride": layer.stride}
            rows = F.unfold(part.double(), layer.kernel_size, **options).movedim(1, 2).reshape(-1, n)
        expected += rows.mT @ rows
    return second_moment(x, TrAct(layer)._geometry())[0], expected


@everywhere
def test_second_moment_of_standardised_inputs(shape, way):
    make_layer, size = SHAPES[shape]
    layer, x = make_layer().cuda(), torch.randn(size, device="cuda")
    actual, expected = _moments(layer, x)
    assert error(actual, expected) < 1e-6
    assert torch.equal(actual, second_moment(x, TrAct(layer)._geometry())[0])


@everywhere
def test_second_moment_of_pixels(shape, way):
    make_layer, size = SHAPES[shape]
    actual, expected = _moments(make_layer(), torch.randint(256, size, device="cuda").float())
    assert error(actual, expected) < 1e-6
    if way == "triton":
        assert torch.equal(actual, expected)  # whole numbers: no sum of 32 products needs more than 24 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_second_moment_of_every_layer(name, dtype, way):
    layer, x, _ = make(name)
    x = x.to(dtype)
    X = reference.rows(layer, x)
    assert error(second_moment(x.cuda(), TrAct(layer)._geometry()).cpu(), X.mT @ X) < 1e-6


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_second_moment_does_not_follow_the_precision_set_for_matrix_products(precision, way):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        make_layer, size = SHAPES["DeiT-B embedding"]
        assert error(*_moments(make_layer(), torch.randn(size, device="cuda"))) < 1e-6
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@everywhere
def test_working_memory_is_bounded(shape, way):
    make_layer, size = SHAPES[shape]
    layer, x = make_layer().cuda(), torch.randn(size, device="cuda")

    def peak(layer):
        for _ in range(2):  # the first one also takes what it keeps: workspaces
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            layer(x).sum().backward()
            layer.zero_grad()
        return torch.cuda.max_memory_allocated()

    plain = peak(layer)
    assert peak(TrAct(layer)) - plain <= 16 * 2**20


# Waiting, capture, errors


@pytest.mark.parametrize("name", A_FEW)
def test_the_host_never_waits_for_the_device(name, way):
    layer, x, direction = _on_device(name)
    _step(layer, x, direction)  # kernels are built and loaded
    with no_waiting():
        for _ in range(3):
            _step(layer, x, direction)
        with accumulate(layer):
            _step(layer, x, direction)


def _warm(layer, x, direction):
    """As torch asks before a capture: some steps on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(layer, x, direction)
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", A_FEW)
def test_a_captured_graph_replays_the_step_on_new_data(name, dtype, way):
    layer, x, direction = _on_device(name, dtype)
    _warm(layer, x, direction)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(layer, x, direction)
    x.normal_()
    graph.replay()
    captured = layer.weight.grad.clone()
    assert error(captured, _gradient(layer, x, direction)) < 1e-4


@pytest.mark.parametrize("name", A_FEW)
def test_forward_and_backward_pass_can_be_captured_apart(name):
    layer, x, direction = _on_device(name)
    expected = _gradient(layer, x, direction)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    assert error(_gradient(graphed, x, direction), expected) < 1e-4


@pytest.mark.parametrize("name", A_FEW)
def test_compiled_without_breaks_it_agrees_with_eager(name):
    torch.compiler.reset()
    layer, x, direction = _on_device(name)
    expected = _gradient(layer, x, direction)
    layer.zero_grad()
    (torch.compile(layer, fullgraph=True)(x) * direction).sum().backward()
    assert error(layer.weight.grad, expected) < 1e-4


@pytest.mark.parametrize("name", ["linear", "linear few rows"])
def test_non_finite_input_raises_by_the_check_after_its_answer_has_arrived(name):
    layer, x, direction = _on_device(name)
    _step(layer, x / 0, direction)
    assert not layer.weight.grad.isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match="expected finite inputs"):
        _step(layer, x, direction)


@two_devices
@pytest.mark.parametrize("name", A_FEW)
def test_on_a_device_that_is_not_the_current_one(name):
    """Its answers are awaited on its own streams, and its gradient is the same."""
    layer, x, direction = _on_device(name)
    expected = _gradient(layer, x, direction).cpu()
    elsewhere = TrAct(make(name, torch.float32)[0].to("cuda:1"), 0.1)
    elsewhere.load_state_dict(layer.state_dict())
    finite._underway.clear()
    _step(elsewhere, x.to("cuda:1"), direction.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {event.device.index for event, _, _ in finite._underway} == {1}
    assert error(elsewhere.weight.grad.cpu(), expected) < 1e-6


# Streams


@pytest.fixture
def slow_side_stream():
    """The side stream has something else to do first, for some tenths of a second."""
    with torch.cuda.stream(side_stream._side_stream(torch.device("cuda", torch.cuda.current_device()))):
        torch.cuda._sleep(3 * 10**8)


@pytest.mark.parametrize("name", MANY_ROWS)
def test_the_backward_pass_waits_for_the_factor(name, slow_side_stream):
    layer, x, direction = _on_device(name)
    actual = _gradient(layer, x, direction)
    torch.cuda.synchronize()
    assert torch.equal(actual, _gradient(layer, x, direction))


@pytest.mark.parametrize("name", MANY_ROWS)
def test_an_input_may_be_overwritten_and_freed_after_the_layer_under_autocast(name, slow_side_stream):
    """The plain layer keeps a copy in half precision."""
    layer, x, direction = _on_device(name)
    with torch.autocast("cuda", torch.bfloat16):
        expected = _gradient(layer, x.clone(), direction)
        torch.cuda.synchronize()
        layer.zero_grad()
        copy = x.clone()
        z = layer(copy)
    copy.fill_(torch.nan)
    del copy
    junk = [torch.full_like(x, torch.nan) for _ in range(8)]
    (z * direction).sum().backward()
    assert torch.equal(layer.weight.grad, expected)
    del junk


@pytest.mark.parametrize("name", MANY_ROWS)
def test_memory_of_a_forward_pass_without_a_backward_pass_is_not_used_too_early(name, slow_side_stream):
    layer, x, direction = _on_device(name)
    for _ in range(5):
        layer(x.clone())
        junk = [torch.full((64, 64), torch.nan, dtype=torch.float64, device="cuda") for _ in range(8)]
    actual = _gradient(layer, x, direction)
    torch.cuda.synchronize()
    del junk
    assert torch.equal(actual, _gradient(layer, x, direction))


@pytest.mark.parametrize("name", MANY_ROWS)
def test_saved_tensors_may_be_taken_to_the_host(name, slow_side_stream):
    layer, x, direction = _on_device(name)
    with torch.autograd.graph.save_on_cpu():
        actual = _gradient(layer, x, direction)
    torch.cuda.synchronize()
    assert torch.equal(actual, _gradient(layer, x, direction))


@pytest.mark.parametrize("name", MANY_ROWS)
def test_a_step_on_a_stream_of_the_user(name, slow_side_stream):
    layer, x, direction = _on_device(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = _gradient(layer, x, direction)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert torch.equal(actual, _gradient(layer, x, direction))
