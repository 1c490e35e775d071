"""What a layer gathers inside :func:`tract.accumulate`: its plain gradient and what its rows say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tract.distributed import all_rows_if_few, mean_over_ranks, world_size
from tract.ops import GradientApart, damped_solve_rows_op, factor_op, second_moment_op, solve_op
from tract.owned import OwnedLayer
from tract.second_moment import Geometry, unfold


class Gathering(OwnedLayer, ABC):
    """A layer that inside :func:`tract.accumulate` gathers what makes its gradient.

    Attributes:
        label: the layer's name in error messages.
    """

    label: str
    _gathered: Any  # None outside of `accumulate`

    def __getstate__(self) -> dict[str, Any]:
        """Without what is gathered: a copy made inside `accumulate` is a layer outside of it."""
        return super().__getstate__() | {"_gathered": None}

    def begin_accumulation(self) -> None:
        """Gather from here on; :func:`tract.accumulate` calls this, a layer goes on from there."""
        if self._gathered is not None:
            raise RuntimeError(
                f"{self.method} layer {self.label}: expected one tract.accumulate at a time, got a second inside "
                "the first; open it once per optimizer step."
            )

    @torch.no_grad()
    def end_accumulation(self) -> None:
        """Add the gradients of all passes together to the parameters' gradients."""
        gathered = self.drop_accumulation()
        for name, gradient in {} if gathered is None else self.gathered_gradients(gathered).items():
            parameter = self._parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def drop_accumulation(self) -> Any:
        """Leave the gathering state and return what was gathered."""
        gathered, self._gathered = self._gathered, None
        return gathered

    @abstractmethod
    def gathered_gradients(self, gathered: Any) -> dict[str, Tensor]:
        """The gradients by the parameters' names."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """The plain layer with the same tensors, hooks and options."""


class Gathered:
    """The plain gradients G of this layer's calls, apart from those of other uses of its weights, and X^T X and b.

    A layer has one weight, or several that make the one it multiplies with: each has its own G, and all have the
    same rows. While there are fewer rows than row elements, b < n, the inputs are kept instead of the n x n
    matrix X^T X. On several ranks that share their rows this would need their numbers; they are
    exchanged only where n x n numbers are many (``Geometry.is_long``).

    Args:
        weights: the layer's parameters by name, whole or sharded, of one shape.
        geometry: how the layer cuts rows out of its inputs.
        everywhere: whether the rows of all ranks count.
        damping: lambda > 0.
    """

    def __init__(self, weights: Mapping[str, Tensor], geometry: Geometry, everywhere: bool, damping: float):
        self._weights, self._geometry, self._everywhere, self._damping = dict(weights), geometry, everywhere, damping
        self._apart = {name: _leaf_like(weight) for name, weight in weights.items()}
        self._keep_inputs = not everywhere or geometry.is_long
        self._forget()

    def _forget(self) -> None:
        for apart in self._apart.values():
            apart.grad = None
        self._inputs: list[Tensor] = []
        self._kept = 0  # rows in these inputs
        self._total: Tensor | None = None
        # b of the total: not a scalar, since torch 2.11 loses additions to one when compiled.
        self._rows: Tensor | None = None

    def take(self, x: Tensor, weights: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """Count the rows of an input, and return what stands for the weights to multiply it with."""
        compiled = torch.compiler.is_compiling()
        if not compiled and self._are_forgotten(weights):
            self._forget()
        if not compiled and self._keep_inputs and self._kept + rows < self._geometry.row_length:
            self._inputs.append(x.detach().clone())
            self._kept += rows
        else:
            self._add(x, rows)
        return {name: GradientApart.apply(weight, self._apart[name]) for name, weight in weights.items()}

    def _are_forgotten(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether zero_grad() has forgotten the gradients of the backward passes until here."""
        if all(apart.grad is None for apart in self._apart.values()):
            return False
        return all(weight is self._weights[name] and weight.grad is None for name, weight in weights.items())

    def _add(self, x: Tensor, rows: int) -> None:
        moment = second_moment_op(x.detach(), self._geometry.numbers(), self._damping)
        if self._total is None:
            self._total, self._rows = moment, moment.new_zeros(1)
        else:
            self._total.add_(moment)
        self._rows.add_(rows)

    def _sum_up(self) -> None:
        for x in self._inputs:
            self._add(x, self._geometry.count_rows(x))
        if self._total is None:
            n = self._geometry.row_length
            self._total = self._any.new_zeros((self._geometry.groups, n, n), dtype=torch.float64)
            self._rows = self._total.new_zeros(1)

    @torch.no_grad()
    def gradients(self, layer: str) -> dict[str, Tensor]:
        """G (X^T X / b + lambda I)^-1 of each weight; nothing without a backward pass on this only rank.

        On several ranks the mean of their products, as DistributedDataParallel gives it.

        Raises:
            tract.NonFiniteError: an input of any rank was not finite.
        """
        if world_size() == 1 and all(apart.grad is None for apart in self._apart.values()):
            return {}
        plain = [apart if apart.grad is None else apart.grad for apart in self._apart.values()]
        groups, n = self._geometry.groups, self._geometry.row_length
        plain = torch.stack([gradient.reshape(groups, -1, n) for gradient in plain], dim=1)  # solved at once
        rows = self._all_rows()
        if rows is not None:
            product = damped_solve_rows_op(plain, rows, self._damping, layer)
        else:
            self._sum_up()
            rows = self._rows if self._everywhere else self._rows.clamp(min=1)
            factor = factor_op(self._total, rows, self._everywhere, self._damping, layer)
            product = solve_op(plain, factor)
        if world_size() > 1:
            product = mean_over_ranks(product)
        parts = zip(self._apart.items(), product.unbind(1), strict=True)
        return {name: part.reshape(apart.shape).contiguous() for (name, apart), part in parts}

    @property
    def _any(self) -> Tensor:
        return next(iter(self._apart.values()))

    def _all_rows(self) -> Tensor | None:
        """The rows of all inputs (g, n, b), float64, where they are fewer than n."""
        if not self._keep_inputs:
            return None
        n, groups = self._geometry.row_length, self._geometry.groups
        empty = self._any.new_zeros((groups, n, 0), dtype=torch.float64)
        own = torch.cat([empty, *(unfold(x, self._geometry) for x in self._inputs)], dim=-1)
        if self._everywhere:
            return all_rows_if_few(own if self._total is None else None, groups, n, self._any.device)
        return own if self._total is None else None


def _leaf_like(weight: Tensor) -> Tensor:
    """A leaf that takes no memory; autograd adds G up in its .grad."""
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape).requires_grad_()
