"""TrAct as a training method: the first layer, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn as nn

from tract.accumulation import accumulate
from tract.layers import Statistics, TrActLayer, checked_options, tract_layers
from tract.methods.base import Method
from tract.surgery import apply_tract


class TrActMethod(Method):
    """The weight gradient of the first layer becomes G (X^T X / b + lambda I)^-1.

    Args:
        lambda_: the damping lambda > 0.
        layer: name of the layer, or several names; None for the first in order of registration.
        statistics: "global" (exact) or "local", see :class:`tract.TrActLayer`.

    Raises:
        TypeError, ValueError: lambda_ is not a positive finite number, or no such statistics.
    """

    advice = ("raise lambda_",)

    def __init__(self, lambda_: float, layer: str | Sequence[str] | None, statistics: Statistics):
        self.lambda_, self.statistics = checked_options(lambda_, None, statistics)
        self.layer = layer

    def apply(self, model: nn.Module) -> str:
        """Wrap the layer."""
        apply_tract(model, self.lambda_, layer=self.layer, statistics=self.statistics)
        layers = ", ".join(f"{layer.label}: {layer}" for layer in tract_layers(model))
        return f"TrAct (lambda {self.lambda_:g}) on {layers}"

    def claims(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The layer's weight, or the endpoints of it, whose gradients are replaced."""
        return (weight for layer in tract_layers(model) for weight in layer.weights().values())

    def param_groups(self, model: nn.Module) -> list[dict]:
        """All but the layer's parameters, then the layer's, which are marked by ``first_layer``."""
        first = dict.fromkeys(parameter for layer in tract_layers(model) for parameter in layer.parameters())
        others = [parameter for parameter in model.parameters() if parameter not in first]
        return [{"params": others}, {"params": list(first), "first_layer": True}]

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Exact gradient of all micro-batches together."""
        return accumulate(model, TrActLayer)

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Frobenius norm and stable rank |W|_F^2 / |W|_2^2 of the first layer's weight, as an (m, n) matrix.

        On a line, of the weight at its midpoint.
        """
        for layer in tract_layers(model):
            singular_values = torch.linalg.svdvals(layer.result_weight().detach().float().flatten(1))
            squared_norm = singular_values.square().sum()
            yield "tract/weight_norm", squared_norm.sqrt().item()
            yield "tract/weight_stable_rank", (squared_norm / singular_values[0].square()).item()
