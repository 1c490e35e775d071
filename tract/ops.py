"""The few operations that torch.compile and autograd treat as single steps.

Each wraps one pure function. As custom operators they compile without graph breaks, may
loop over buffers and talk to other ranks, and can state that they have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tract.damped_solve import damped_solve, damped_solve_dual, damped_solve_rows
from tract.distributed import global_mean
from tract.finite import require
from tract.second_moment import Geometry, output_columns, second_moment, unfold

_SECOND_DERIVATIVE = (
    "TrAct has no second derivative: its weight gradient is an update direction, not the "
    "gradient of a function; call backward without create_graph=True, or tract.unwrap(model) first."
)


@torch.library.custom_op("tract::second_moment", mutates_args=())
def second_moment_op(x: Tensor, geometry: list[int]) -> Tensor:
    """X^T X of one input, shape (g, n, n), float64; ``geometry`` as :meth:`Geometry.numbers`."""
    return second_moment(x, Geometry.of(geometry))


@second_moment_op.register_fake
def _(x, geometry):
    rows = Geometry.of(geometry)
    return x.new_empty((rows.groups, rows.row_length, rows.row_length), dtype=torch.float64)


@torch.library.custom_op("tract::mean_moment", mutates_args=())
def mean_moment_op(total: Tensor, rows: Tensor, everywhere: bool, layer: str) -> Tensor:
    """A = X^T X / b over this rank or over all, shape (g, n, n), float64; finite or an error."""
    mean = global_mean(total, rows, everywhere)
    require(torch.isfinite(mean.sum()), _non_finite(layer))
    return mean


@mean_moment_op.register_fake
def _(total, rows, everywhere, layer):
    return torch.empty_like(total)


@torch.library.custom_op("tract::damped_solve", mutates_args=())
def damped_solve_op(gradient: Tensor, moment: Tensor, damping: float, layer: str) -> Tensor:
    """G (A + lambda I)^-1 in the shape and dtype of G, a weight's gradient."""
    return _solved(damped_solve, gradient, moment, damping, layer)


def _solved(solve: Callable, gradient: Tensor, by: Tensor, damping: float, layer: str) -> Tensor:
    """What a solver that takes (g, m, n) makes of a gradient in its weight's shape; ``by`` is (g, n, ...)."""
    groups, n = by.shape[:2]
    product, succeeded = solve(gradient.reshape(groups, -1, n), by, damping)
    require(succeeded, _not_factorised(layer, damping))
    return product.to(gradient.dtype).reshape(gradient.shape).contiguous()


@damped_solve_op.register_fake
def _(gradient, moment, damping, layer):
    return gradient.new_empty(gradient.shape)


@torch.library.custom_op("tract::damped_solve_dual", mutates_args=())
def damped_solve_dual_op(output_gradient: Tensor, x: Tensor, geometry: list[int], damping: float, layer: str) -> Tensor:
    """D (X X^T / b + lambda I)^-1 X, shape (g, m, n), float64, from an output's gradient D."""
    how = Geometry.of(geometry)
    rows = unfold(x, how)
    require(torch.isfinite(rows.sum()), _non_finite(layer))
    product, succeeded = damped_solve_dual(output_columns(output_gradient, how), rows, damping)
    require(succeeded, _not_factorised(layer, damping))
    return product.contiguous()


@damped_solve_dual_op.register_fake
def _(output_gradient, x, geometry, damping, layer):
    how = Geometry.of(geometry)
    outputs = output_gradient.shape[-1 - len(how.kernel)]
    return output_gradient.new_empty((how.groups, outputs // how.groups, how.row_length), dtype=torch.float64)


@torch.library.custom_op("tract::damped_solve_rows", mutates_args=())
def damped_solve_rows_op(gradient: Tensor, rows: Tensor, damping: float, layer: str) -> Tensor:
    """G (X^T X / b + lambda I)^-1 in the shape and dtype of G, from rows (g, n, b), float64."""
    require(torch.isfinite(rows.sum()), _non_finite(layer))
    return _solved(damped_solve_rows, gradient, rows, damping, layer)


@damped_solve_rows_op.register_fake
def _(gradient, rows, damping, layer):
    return gradient.new_empty(gradient.shape)


def _non_finite(layer: str) -> str:
    return (
        f"TrAct layer {layer}: expected finite inputs (with finite squares), got inf or nan; check the data and its "
        "normalisation, and the loss of the steps before."
    )


def _not_factorised(layer: str, damping: float) -> str:
    return (
        f"TrAct layer {layer}: the second moment of its input plus lambda_={damping:g} could not be "
        "factorised; standardise the inputs or raise lambda_."
    )


class PreconditionWeight(torch.autograd.Function):
    """Identity on the weight going forward; G |-> G (A + lambda I)^-1 going back."""

    @staticmethod
    def forward(weight: Tensor, moment: Tensor, damping: float, layer: str) -> Tensor:
        """The weight itself (a view)."""
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the second moment or the rows."""
        _, moment, ctx.damping, ctx.layer = inputs
        ctx.save_for_backward(moment)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The preconditioned weight gradient."""
        (moment,) = ctx.saved_tensors
        product = damped_solve_op(gradient.detach(), moment, ctx.damping, ctx.layer)
        return first_derivative(product), None, None, None


class PreconditionByRows(PreconditionWeight):
    """The same with the rows (g, n, b) of all ranks in place of their second moment, for b < n."""

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The preconditioned weight gradient."""
        (rows,) = ctx.saved_tensors
        product = damped_solve_rows_op(gradient.detach(), rows, ctx.damping, ctx.layer)
        return first_derivative(product), None, None, None


class GradientApart(torch.autograd.Function):
    """Identity on the weight; its gradient goes to ``apart``, and a zero to the weight.

    So that the weight takes part in the backward pass, as DistributedDataParallel expects.
    """

    @staticmethod
    def forward(weight: Tensor, apart: Tensor) -> Tensor:
        """The weight itself (a view)."""
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """Zero and the gradient."""
        return gradient.new_zeros(()).expand(gradient.shape), first_derivative(gradient)


class _EndOfDifferentiation(torch.autograd.Function):
    """Identity that cannot be differentiated; ``anchor`` requires a gradient, so that it is always asked."""

    @staticmethod
    def forward(gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise RuntimeError(_SECOND_DERIVATIVE)


def first_derivative(gradient: Tensor) -> Tensor:
    """The gradient itself; a derivative of it is an error. (Gradients are on here with create_graph=True only.)"""
    if not torch.is_grad_enabled():
        return gradient
    return _EndOfDifferentiation.apply(gradient, torch.zeros((), requires_grad=True))


class FirstDerivativeOnly(torch.autograd.Function):
    """Identity on an output whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(output: Tensor) -> Tensor:
        """The output itself."""
        return output

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """The output is handed on, not copied; an in-place operation may follow."""
        ctx.mark_dirty(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return first_derivative(gradient)


class PreconditionDual(torch.autograd.Function):
    """The output going forward; the TrAct weight gradient from the output's gradient going back.

    For an input with fewer rows than row elements. ``output`` must not depend on the weight
    otherwise; its own gradient passes unchanged. Keeps a reference to the input, as the
    layer's own backward does.
    """

    @staticmethod
    def forward(output: Tensor, weight: Tensor, x: Tensor, geometry: list[int], damping: float, layer: str) -> Tensor:
        """The output itself."""
        return output

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep a reference to the input. An in-place operation may follow on the output."""
        ctx.mark_dirty(output)
        _, weight, x, ctx.geometry, ctx.damping, ctx.layer = inputs
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The output's gradient as it is, and the weight gradient."""
        (x,) = ctx.saved_tensors
        product = damped_solve_dual_op(gradient.detach(), x, ctx.geometry, ctx.damping, ctx.layer)
        product = product.to(ctx.weight_dtype).reshape(ctx.weight_shape)
        return first_derivative(gradient), first_derivative(product), None, None, None, None
