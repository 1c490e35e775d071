"""What the Triton kernels compute, by Triton's interpreter; `test_tract_gpu_moment.py` runs this file."""

import pytest
import torch

from tests import reference
from tests.tract_layers import LAYERS, error, make
from tract import TrAct, gpu_moment
from tract.gpu_moment import second_moment

COVERED = [
    name
    for name, (kind, _, options, _) in LAYERS.items()
    if kind is not torch.nn.Conv3d and options.get("padding_mode", "zeros") == "zeros"
]


def _moments(layer, x):
    X = reference.rows(layer, x)
    return second_moment(x, TrAct(layer)._geometry()), X.mT @ X


@pytest.mark.parametrize("name", COVERED)
def test_second_moment_is_that_of_the_rows_and_symmetric_to_the_bit(name):
    layer, x, _ = make(name, torch.float32)
    actual, expected = _moments(layer, x)
    assert actual.dtype == torch.float64
    assert error(actual, expected) < 3e-7
    assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("name", ["linear", "conv1d same", "conv2d strided", "conv2d groups"])
def test_whole_numbers_up_to_255_give_the_exact_sum(name):
    layer, x, _ = make(name, torch.float32)
    assert torch.equal(*_moments(layer, torch.randint_like(x, 256)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv1d same", "conv2d strided"])
def test_half_precision_is_multiplied_exactly(name, dtype):
    layer, x, _ = make(name)
    assert error(*_moments(layer, x.to(dtype))) < 2e-7


@pytest.mark.parametrize("seed", range(12))
def test_random_geometries(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    groups, spatial = number(1, 3), number(1, 2)
    options = {
        key: tuple(number(*bounds) for _ in range(spatial))
        for key, bounds in {"kernel_size": (1, 5), "stride": (1, 4), "padding": (0, 4), "dilation": (1, 3)}.items()
    }
    kind = (torch.nn.Conv1d, torch.nn.Conv2d)[spatial - 1]
    layer = kind(groups * number(1, 4), groups, groups=groups, **options)
    x = torch.randn(number(1, 5), layer.in_channels, *(number(13, 17) for _ in range(spatial)))
    assert error(*_moments(layer, x)) < 3e-7


@pytest.mark.parametrize("name", ["linear tokens", "conv2d", "conv2d patches"])
def test_any_strides_are_read(name):
    layer, x, _ = make(name, torch.float32)
    expected = _moments(layer, x)[1]
    apart = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2].copy_(x)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    channels = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for same in (apart, turned, channels):
        assert error(second_moment(same, TrAct(layer)._geometry()), expected) < 3e-7


def test_many_rows_are_split_and_give_the_same_bits_each_time():
    layer, x = torch.nn.Conv2d(2, 3, 3, padding=1), torch.randn(3, 2, 12, 11)
    actual, expected = _moments(layer, x)
    assert error(actual, expected) < 2e-7
    assert torch.equal(actual, _moments(layer, x)[0])


def test_one_sum_over_many_rows_keeps_more_digits_than_float32(monkeypatch):
    monkeypatch.setattr(gpu_moment, "_PROGRAMS", 1)
    actual, expected = _moments(torch.nn.Linear(6, 2), torch.randint(256, (2000, 6)).float())
    assert expected.max() > 2**24
    assert torch.equal(actual, expected)


def test_many_blocks_of_a_long_row():
    layer, x = torch.nn.Conv2d(3, 2, (8, 7)), torch.randn(2, 3, 9, 9)  # n = 168, three blocks of 64
    assert error(*_moments(layer, x)) < 3e-7


def test_no_rows_give_zero():
    layer = torch.nn.Linear(5, 2)
    assert torch.equal(second_moment(torch.randn(0, 5), TrAct(layer)._geometry()), torch.zeros(1, 5, 5).double())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_non_finite_input_gives_a_non_finite_sum(bad):
    layer, x, _ = make("conv2d", torch.float32)
    x[1, 2, 3, 4] = bad
    assert not _moments(layer, x)[0].sum().isfinite()
