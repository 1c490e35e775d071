"""Agreement with torch_tract 1.0.0, the implementation of the paper's authors."""

import pytest
import torch.nn as nn

from tests.reference import plain_gradients
from tests.tract_layers import LAYERS, error, gradients, make
from tract import TrAct

torch_tract = pytest.importorskip("torch_tract", reason="torch_tract is not installed: pip install torch_tract==1.0.0")


def _in_its_reach(kind, options, shape):
    batched = len(shape) >= (2 if kind is nn.Linear else 4)
    plain_options = set(options) <= {"stride", "padding", "bias"} and not isinstance(options.get("padding"), str)
    return kind in (nn.Linear, nn.Conv2d) and batched and plain_options


SHARED = [name for name, (kind, _, options, shape) in LAYERS.items() if _in_its_reach(kind, options, shape)]


def _twins(name, damping):
    layer, x, direction = make(name)
    theirs = [g.clone() for g in gradients(torch_tract.TrAct(layer, l=damping), x, direction) if g is not None]
    ours = [g.clone() for g in gradients(TrAct(layer, l=damping), x, direction) if g is not None]
    return ours, theirs


@pytest.mark.parametrize("damping", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("name", SHARED)
def test_output_and_all_gradients_are_those_of_torch_tract(name, damping):
    for ours, theirs in zip(*_twins(name, damping), strict=True):
        assert error(ours, theirs) < 1e-11


def test_the_comparison_covers_few_and_many_rows_of_both_layer_types():
    def few(name):
        layer, x, _ = make(name)
        return plain_gradients(layer, x, layer(x))[0].numel() // len(layer.weight) < layer.weight[0].numel()

    assert {(LAYERS[name][0], few(name)) for name in SHARED} == {
        (kind, rows_are_few) for kind in (nn.Linear, nn.Conv2d) for rows_are_few in (True, False)
    }
