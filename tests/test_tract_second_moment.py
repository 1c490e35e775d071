import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tract.second_moment as code
from tests import reference
from tests.tract_layers import A_FEW, LAYERS, error, make, tract_gradient
from tract import TrAct


def _total(layer, x):
    return code.second_moment(x, TrAct(layer)._geometry())


@pytest.fixture
def limit(monkeypatch):
    """Set the size of the work buffer, in elements."""
    return lambda elements: monkeypatch.setattr(code, "_BUFFER_ELEMENTS", elements)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_second_moment_is_the_sum_of_outer_products_of_rows_in_float64(name, dtype):
    layer, x, _ = make(name)
    x = x.to(dtype)
    X = reference.rows(layer, x)
    total = _total(layer, x)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, X.mT @ X, rtol=1e-12, atol=1e-12 * X.square().sum().item())


@pytest.mark.parametrize("name", LAYERS)
def test_row_count_is_the_number_of_rows(name):
    layer, x, _ = make(name)
    assert TrAct(layer)._geometry().count_rows(x) == reference.rows(layer, x).shape[1]


@pytest.mark.parametrize("name", LAYERS)
def test_unfold_gives_the_rows_in_some_order(name):
    layer, x, _ = make(name)
    unfolded = code.unfold(x, TrAct(layer)._geometry()).mT
    for actual, expected in zip(unfolded, reference.rows(layer, x), strict=True):
        assert sorted(actual.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("elements", [1, 60, 300, 1000])
@pytest.mark.parametrize("name", LAYERS)
def test_cutting_into_samples_and_slabs_changes_nothing(name, elements, limit):
    layer, x, direction = make(name)
    limit(elements)
    assert (
        error(_total(layer, x) / x.shape[0], reference.second_moment(layer, x) * _rows(layer, x) / x.shape[0]) < 1e-12
    )
    expected = reference.tract_gradient(layer, x, direction, 0.1)
    assert error(tract_gradient(layer, x, direction), expected) < 1e-11


def _rows(layer, x):
    return reference.rows(layer, x).shape[1]


@pytest.mark.parametrize("elements", [1, 300, 10**6])
@pytest.mark.parametrize("name", A_FEW)
def test_blocks_hold_every_row_once_and_respect_the_buffer(name, elements, limit):
    """A block is as large as the buffer, or the smallest possible: one line of output positions."""
    layer, x, _ = make(name)
    limit(elements)
    geometry = TrAct(layer)._geometry()
    blocks = [block.clone() for block in code._row_blocks(x, geometry, x.dtype)]
    assert sum(block.shape[1] for block in blocks) == _rows(layer, x)
    line = torch.Size(geometry.output_size(tuple(x.shape[2:]))[1:]).numel() if geometry.kernel else 1
    smallest = line * geometry.groups * geometry.row_length
    assert all(block.numel() <= max(elements, smallest) for block in blocks)


class _LargestStorage(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("batch", [8, 32])
def test_working_memory_does_not_grow_with_the_batch(batch, limit):
    layer = torch.nn.Conv2d(2, 4, 7, stride=2, padding=3)
    x = torch.randn(batch, 2, 32, 32)
    limit(10_000)
    with _LargestStorage() as largest:
        _total(layer, x)
    a_sample, a_moment, the_input = 2 * 38 * 38, 98 * 98, x.numel() // 2
    assert largest.bytes <= 8 * max(10_000, a_sample, a_moment, the_input)
    assert largest.bytes < 8 * reference.rows(layer, x[:8]).numel() // 4


def _saved_sizes(layer, x):
    """Sizes of the tensors that autograd keeps between forward and backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    return sorted(sizes)


@pytest.mark.parametrize("name", LAYERS)
def test_autograd_keeps_one_second_moment_or_the_input_beside_what_the_plain_layer_keeps(name):
    layer, x, _ = make(name)
    kept = _saved_sizes(TrAct(layer), x)
    for size in _saved_sizes(layer, x):
        kept.remove(size)
    n = layer.weight[0].numel()
    few = _rows(layer, x) < n
    assert kept in ([[], [x.numel()]] if few else [[n * n * getattr(layer, "groups", 1)]])


@pytest.mark.parametrize("name", ["linear few rows", "conv2d few rows"])
def test_with_few_rows_autograd_keeps_the_input_and_the_weight_themselves_and_no_copy(name):
    layer, x, _ = make(name)
    places = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: places.append(t.data_ptr()) or t, lambda t: t):
        TrAct(layer)(x.requires_grad_())
    assert x.data_ptr() in places
    assert set(places) <= {x.data_ptr(), layer.weight.data_ptr()}
