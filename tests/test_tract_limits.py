"""Inputs and damping for which the gradient is known in closed form."""

import pytest
import torch
import torch.nn as nn

from tests.reference import plain_gradients, rows, second_moment
from tests.tract_layers import LAYERS, error, make, tract_gradient


def _linear(x):
    layer = nn.Linear(x.shape[-1], 3, dtype=x.dtype)
    direction = torch.randn(len(x), 3, dtype=x.dtype)
    return layer, direction, plain_gradients(layer, x, direction)[1]


@pytest.mark.parametrize("name", LAYERS)
def test_with_infinite_damping_gradient_times_damping_is_the_plain_gradient(name):
    layer, x, direction = make(name)
    plain = plain_gradients(layer, x, direction)[1]
    errors = [error(tract_gradient(layer, x, direction, d) * d, plain) for d in (1e6, 1e8)]
    assert errors[0] < second_moment(layer, x).diagonal(dim1=-2, dim2=-1).sum(-1).max() / 1e6
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("b", [8, 20])
def test_rows_with_identity_second_moment_divide_the_gradient_by_one_plus_damping(b, damping):
    x = torch.linalg.qr(torch.randn(b, 8).double())[0] * b**0.5
    layer, direction, plain = _linear(x)
    assert error(tract_gradient(layer, x, direction, damping), plain / (1 + damping)) < 1e-12


def test_whitened_convolution_input_divides_the_gradient_by_one_plus_damping():
    """Patches that do not overlap, whitened patch by patch."""
    patches = torch.randn(4 * 9, 12).double()
    patches = patches @ torch.linalg.inv(torch.linalg.cholesky(patches.mT @ patches / len(patches))).mT
    images = patches.reshape(4, 3, 3, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 6, 6)
    layer = nn.Conv2d(3, 5, 2, stride=2).double()
    direction = torch.randn_like(layer(images))
    plain = plain_gradients(layer, images, direction)[1]
    assert error(tract_gradient(layer, images, direction, 0.1), plain / 1.1) < 1e-12


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
def test_one_hot_rows_divide_each_column_by_its_frequency_plus_damping(damping):
    which = torch.tensor([0, 0, 0, 1, 1, 3])
    x = torch.eye(4).double()[which]
    layer, direction, plain = _linear(x)
    frequency = torch.tensor([3, 2, 0, 1]).double() / 6
    assert error(tract_gradient(layer, x, direction, damping), plain / (frequency + damping)) < 1e-12


def test_one_row_divides_the_gradient_by_its_square_plus_damping():
    """Sherman-Morrison: G is a multiple of x^T, an eigenvector of the second moment x x^T."""
    row = torch.randn(1, 9).double()
    layer, direction, plain = _linear(row)
    assert error(tract_gradient(layer, row, direction, 0.1), plain / (row.square().sum() + 0.1)) < 1e-11


@pytest.mark.parametrize("name", [name for name, (_, _, _, shape) in LAYERS.items() if len(shape) > 1])
def test_repeating_the_batch_under_a_mean_loss_changes_nothing(name):
    layer, x, direction = make(name)
    if "unbatched" in name:
        x, direction = x[None], direction[None]
    once = tract_gradient(layer, x, direction).clone()
    repeated = tract_gradient(layer, torch.cat([x] * 4), torch.cat([direction] * 4) / 4)
    assert error(repeated, once) < 1e-10


@pytest.mark.parametrize("name", ["linear few rows", "conv1d few rows", "conv2d few rows", "conv2d groups few rows"])
def test_with_little_damping_a_step_moves_each_output_along_its_own_gradient(name):
    """The idea of the method: X dW^T = b dz up to damping / smallest eigenvalue, for independent rows."""
    layer, x, direction = make(name)
    X = rows(layer, x)
    b, smallest = X.shape[1], torch.linalg.eigvalsh(X @ X.mT).min() / X.shape[1]
    assert smallest > 0.01
    step = tract_gradient(layer, x, direction, 1e-4).reshape(len(X), -1, X.shape[-1])
    assert error(X @ step.mT, b * plain_rows(layer, direction)) < 1e-4 / smallest


def plain_rows(layer, z):
    """Outputs as (groups, b, m), rows in the order of `reference.rows`."""
    if isinstance(layer, nn.Linear):
        return z[None]
    return z.flatten(2).permute(2, 0, 1).flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1)
