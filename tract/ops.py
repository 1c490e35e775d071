"""The few operations that torch.compile and autograd treat as single steps.

Each wraps one pure function. As custom operators they compile without graph breaks, may
loop over buffers and talk to other ranks, and can state that they have no derivative.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from tract import gpu_moment
from tract.damped_solve import damped_factor, damped_solve_dual, damped_solve_rows, solve_by
from tract.distributed import global_mean
from tract.finite import require
from tract.second_moment import Geometry, output_columns, second_moment_for, unfold
from tract.side_stream import join
from tract.whole_float32 import whole_float32

_SECOND_DERIVATIVE = (
    "TrAct has no second derivative: its weight gradient is an update direction, not the "
    "gradient of a function; call backward without create_graph=True, or tract.unwrap(model) first."
)


def _operator(function: Callable) -> Callable:
    """The function as a custom operator, tract::NAME; it changes none of its arguments and nothing differentiates it.

    (``torch.library.custom_op`` would do the same, and add 60 us to each call: a tenth of a small layer's time.)
    """
    name = f"tract::{function.__name__.removesuffix('_op')}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default")(function)
    return getattr(torch.ops.tract, name.partition("::")[2]).default


def _shape_of(operator: torch._ops.OpOverload) -> Callable:
    """Registers what the operator returns for tensors without data."""
    return torch.library.register_fake(operator.name().partition(".")[0])


@_operator
def second_moment_op(x: Tensor, geometry: list[int], damping: float) -> Tensor:
    """X^T X of one input, shape (g, n, n), float64; ``geometry`` as :meth:`Geometry.numbers`."""
    how = Geometry.of(geometry)
    return gpu_moment.second_moment(x, how) if gpu_moment.supports(x, how) else second_moment_for(x, how, damping)


@_shape_of(second_moment_op)
def _(x, geometry, damping):
    rows = Geometry.of(geometry)
    return x.new_empty((rows.groups, rows.row_length, rows.row_length), dtype=torch.float64)


@_operator
def factor_op(total: Tensor, rows: Tensor, everywhere: bool, damping: float, layer: str) -> Tensor:
    """The lower Cholesky factor of A + lambda I, A = X^T X / b over this rank or over all; finite or an error."""
    mean = global_mean(total, rows, everywhere)
    trace = mean.diagonal(dim1=-2, dim2=-1).sum(-1)
    _require_finite(trace if len(trace) == 1 else trace.sum(0, keepdim=True), layer)
    factor, succeeded = damped_factor(mean, damping, trace)
    require(succeeded, _not_factorised(layer, damping))
    return factor


@_shape_of(factor_op)
def _(total, rows, everywhere, damping, layer):
    n = total.shape[-1]
    return total.new_empty_strided(total.shape, (n * n, 1, n))  # LAPACK's order


@_operator
def solve_op(gradient: Tensor, factor: Tensor) -> Tensor:
    """G (A + lambda I)^-1 in the shape and dtype of G, a weight's gradient, by the Cholesky factor (g, n, n)."""
    return _in_shape(gradient, solve_by(_as_matrices(gradient, factor), factor))


@_shape_of(solve_op)
def _(gradient, factor):
    return gradient.new_empty(gradient.shape)


def _as_matrices(gradient: Tensor, by: Tensor) -> Tensor:
    """A gradient in its weight's shape as (g, m, n), for ``by`` of (g, n, ...)."""
    groups, n = by.shape[:2]
    return gradient.reshape(groups, -1, n)


def _in_shape(gradient: Tensor, product: Tensor) -> Tensor:
    result = gradient.new_empty(gradient.shape)
    result.view(product.shape).copy_(product)
    return result


@_operator
def damped_solve_dual_op(output_gradient: Tensor, x: Tensor, geometry: list[int], damping: float, layer: str) -> Tensor:
    """D (X X^T / b + lambda I)^-1 X, shape (g, m, n), float64, from an output's gradient D."""
    how = Geometry.of(geometry)
    in_float32 = x.is_cuda and x.dtype != torch.float64  # many GPUs have few float64 units
    rows = unfold(x, how, torch.float32 if in_float32 else torch.float64)
    _require_finite(rows.sum()[None], layer)
    with torch.autocast(x.device.type, enabled=False), whole_float32():
        product, succeeded = damped_solve_dual(output_columns(output_gradient, how), rows, damping)
    require(succeeded, _not_factorised(layer, damping))
    return product.double().contiguous()


@_shape_of(damped_solve_dual_op)
def _(output_gradient, x, geometry, damping, layer):
    how = Geometry.of(geometry)
    outputs = output_gradient.shape[-1 - len(how.kernel)]
    return output_gradient.new_empty((how.groups, outputs // how.groups, how.row_length), dtype=torch.float64)


@_operator
def damped_solve_rows_op(gradient: Tensor, rows: Tensor, damping: float, layer: str) -> Tensor:
    """G (X^T X / b + lambda I)^-1 in the shape and dtype of G, from rows (g, n, b), float64."""
    _require_finite(rows.sum()[None], layer)
    product, succeeded = damped_solve_rows(_as_matrices(gradient, rows), rows, damping)
    require(succeeded, _not_factorised(layer, damping))
    return _in_shape(gradient, product)


@_shape_of(damped_solve_rows_op)
def _(gradient, rows, damping, layer):
    return gradient.new_empty(gradient.shape)


def _require_finite(total: Tensor, layer: str) -> None:
    """Of a sum, shape (1,), that is finite if what was added is (two kernels; isfinite has four)."""
    require((total - total)[0] == 0, _non_finite(layer))


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


class _Function(torch.autograd.Function):
    """An autograd function whose ``forward`` knows its signature; ``apply`` else finds it out in each call (30 us)."""

    def __init_subclass__(cls) -> None:
        cls.forward.__signature__ = inspect.signature(cls.forward)
        super().__init_subclass__()


class PreconditionWeight(_Function):
    """Identity on the weight going forward; G |-> G (A + lambda I)^-1 going back."""

    @staticmethod
    def forward(weight: Tensor, factor: Tensor, beside: bool) -> Tensor:
        """The weight itself (a view)."""
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the Cholesky factor of A + lambda I, and whether it may come from the side stream."""
        _, factor, ctx.beside = inputs
        ctx.save_for_backward(factor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The preconditioned weight gradient."""
        (factor,) = ctx.saved_tensors
        join(factor, ctx.beside)
        return first_derivative(solve_op(gradient.detach(), factor)), None, None


class PreconditionByRows(_Function):
    """The same from the rows (g, n, b) of all ranks, for b < n."""

    @staticmethod
    def forward(weight: Tensor, rows: Tensor, damping: float, layer: str) -> Tensor:
        """The weight itself (a view)."""
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the rows."""
        _, rows, ctx.damping, ctx.layer = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The preconditioned weight gradient."""
        (rows,) = ctx.saved_tensors
        product = damped_solve_rows_op(gradient.detach(), rows, ctx.damping, ctx.layer)
        return first_derivative(product), None, None, None


class GradientApart(_Function):
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


class _EndOfDifferentiation(_Function):
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


class FirstDerivativeOnly(_Function):
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


class PreconditionDual(_Function):
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
