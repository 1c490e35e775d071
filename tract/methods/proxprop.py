"""ProxProp as a training method: proximal steps on all layers but the classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch.nn as nn

from tract.accumulation import accumulate
from tract.conjugate_gradients import Variant
from tract.distributed import world_size
from tract.layers import Statistics
from tract.methods.base import Method
from tract.owned import OwnedLayer, taken
from tract.proxprop import ProxProp, ProxPropLayer, checked_mode, checked_tau
from tract.surgery import linear_and_conv_layers, named_layer, replace_module


class ProxPropMethod(Method):
    """The gradient A^T g of a layer z = A theta becomes (A^T A + I / tau)^-1 A^T g.

    arXiv 1706.04638; see :mod:`tract.proxprop`. An optimizer of any kind takes the step.

    Args:
        tau: step size of the proximal step, > 0; for single layers by name, {name: tau}, of which
            the others are left plain.
        mode: "prox_exact", "prox_cgN" or "gradient".
        layers: their names; None for every Linear and (transposed) convolution but the last, which another method
            may not have then.
        variant: of conjugate gradients.
        statistics: A^T A over all ranks ("global", exact) or over this one's rows ("local").

    Raises:
        TypeError, ValueError: no such mode, or tau is not a positive finite number; (of ``apply``) no such layer.
    """

    advice = ("lower method.tau",)

    def __init__(
        self,
        tau: float | Mapping[str, float],
        mode: str,
        layers: Sequence[str] | None,
        variant: Variant,
        statistics: Statistics,
    ):
        self.of_layer = {name: checked_tau(value) for name, value in tau.items()} if isinstance(tau, Mapping) else None
        if self.of_layer is not None and layers is not None:
            raise ValueError("expected layers=null where tau names them, got both; leave one out.")
        self.tau = None if self.of_layer is not None else checked_tau(tau)
        self.mode, self.layers, self.variant, self.statistics = checked_mode(mode), layers, variant, statistics

    def apply(self, model: nn.Module) -> str:
        """Wrap the layers."""
        skips = any(getattr(module, "skips_parameters", False) for module in model.modules())
        if skips and self.statistics == "global" and world_size() > 1:
            raise ValueError(
                "expected a network whose layers all ranks pass through together, got one that skips some at random; "
                "use one rank, or method.statistics=local."
            )
        for name, tau in self._chosen(model).items():
            plain = named_layer(model, name)
            wrapped = ProxProp(plain, tau, self.mode, variant=self.variant, statistics=self.statistics)
            wrapped.label = name
            replace_module(model, plain, wrapped)
        return f"ProxProp ({self.mode}) on {', '.join(f'{layer.label}: {layer}' for layer in _layers(model))}"

    def _chosen(self, model: nn.Module) -> dict[str, float]:
        if self.of_layer is not None:
            return self.of_layer
        if self.layers is not None:
            return dict.fromkeys(self.layers, self.tau)
        for name, layer in model.named_modules():
            if isinstance(layer, OwnedLayer):
                raise TypeError(
                    "ProxProp without layers=[NAMES] takes every layer but the last: expected plain ones, "
                    f"{taken(layer, name)}"
                )
        *names, _ = linear_and_conv_layers(model) or [None]
        if not names:
            raise ValueError("expected a model with two Linear or convolution layers, got fewer; name one in layers.")
        return dict.fromkeys(names, self.tau)

    def claims(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """The layers' parameters, whose gradients are replaced."""
        return (parameter for layer in _layers(model) for parameter in layer.parameters())

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Exact increments of all micro-batches together."""
        return accumulate(model, ProxPropLayer)


def _layers(model: nn.Module) -> list[ProxPropLayer]:
    return [module for module in model.modules() if isinstance(module, ProxPropLayer)]
