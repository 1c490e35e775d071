"""TrAct layers: nn.Linear and nn.Conv1d/2d/3d whose weight gradient follows the pre-activations.

TrAct (Petersen, Borgelt, Ermon, NeurIPS 2024, arXiv 2410.23970) replaces the weight
gradient G = dL/dz x^T of a first layer z = W x by

    G (x x^T / b + lambda I)^-1,

the change of W that best realises a gradient step on the pre-activations z, with b rows in
the batch. Forward pass, bias gradient and input gradient stay as they are, and so does the
optimizer: it is handed this matrix as "the gradient".

Here the layer's own forward and backward kernels run on P(W), where P is the identity going
forward and multiplies by the inverse going back. (With fewer rows than row elements, b < n,
the weight gradient is computed from a b x b inverse instead.) Every option of the layer, autocast,
torch.compile and channels_last therefore work as they do without TrAct.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tract import side_stream
from tract.distributed import all_rows_if_few, sharded_like, world_size
from tract.gathered import Gathered, Gathering
from tract.ops import (
    FirstDerivativeOnly,
    PreconditionByRows,
    PreconditionDual,
    PreconditionWeight,
    factor_op,
    second_moment_op,
)
from tract.owned import OwnedLayer, taken
from tract.second_moment import Geometry, unfold

DEFAULT_LAMBDA = 0.1
Statistics = Literal["global", "local"]


class TrActLayer(Gathering):
    """What all TrAct layers share; use :func:`TrAct` or one of the TrAct* classes.

    Attributes:
        lambda_: the damping lambda > 0, the method's only hyper-parameter.
        statistics: "global" takes the second moment over all ranks of the process group,
            "local" over this rank's rows only (no communication, an approximation).
        label: the name used in error messages; :func:`tract.apply_tract` sets the path of
            the layer in its model.
    """

    method = "TrAct"
    plain_type: ClassVar[type[nn.Module]]
    lambda_: float
    statistics: Statistics

    def _configure(self, lambda_: float | None, l: float | None, statistics: Statistics) -> None:  # noqa: E741
        self.lambda_, self.statistics = checked_options(lambda_, l, statistics)
        self.label = type(self).__name__
        self._gathered = None

    def _geometry(self) -> Geometry:
        return geometry_of(self)  # read anew each time: options such as stride are often changed on a finished layer

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The parameters that make the weight, by name: the weight itself."""
        return {"weight": self.weight}

    def _made_of(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the forward pass, from :meth:`weights` or what stands for them."""
        return weights["weight"], self.bias

    def result_weight(self) -> Tensor:
        """The weight of the network that is evaluated."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output; records what the weight gradient will need."""
        if isinstance(x, torch.fx.Proxy):  # torch.fx takes the layer as a whole, as it does the plain one
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        weights, geometry = self.weights(), self._geometry()
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights.values())
        if torch.jit.is_tracing() and self.training:
            raise RuntimeError(
                f"TrAct layer {self.label}: expected a model in evaluation for torch.jit.trace, whose graph cannot "
                "train with TrAct, got one in training; call model.eval() first."
            )
        exported = (torch.compiler.is_exporting() or torch.jit.is_tracing()) and not self.training
        if exported or not (trains and geometry.fits(x)):
            return self._plain_forward(x, *self._made_of(weights))
        rows = geometry.count_rows(x)
        if self._gathered is not None:
            weight, bias = self._made_of(self._gathered.take(x, weights, rows))
            return FirstDerivativeOnly.apply(self._plain_forward(x, weight, bias))
        weight, bias = self._made_of(weights)
        if 0 < rows < geometry.row_length and not self._everywhere:
            output = self._plain_forward(x, weight.detach(), bias)
            return PreconditionDual.apply(output, weight, x.detach(), geometry.numbers(), self.lambda_, self.label)
        weight = self._preconditioned(weight, x, geometry, rows)
        return FirstDerivativeOnly.apply(self._plain_forward(x, weight, bias))

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuses torch.jit.script, which would put what is returned here into the model itself."""
        raise RuntimeError(
            f"TrAct layer {self.label}: expected plain layers for torch.jit.script, got TrAct; script "
            "tract.unwrap(copy.deepcopy(model)), which computes the same."
        )

    @property
    def _everywhere(self) -> bool:
        return self.statistics == "global" and world_size() > 1

    def _preconditioned(self, weight: Tensor, x: Tensor, geometry: Geometry, rows: int) -> Tensor:
        n = geometry.row_length
        if self._everywhere and geometry.is_long:
            own = unfold(x, geometry) if rows < n else None
            few = all_rows_if_few(own, geometry.groups, n, x.device)
            if few is not None:
                return PreconditionByRows.apply(weight, few, self.lambda_, self.label)
        total = second_moment_op(x.detach(), geometry.numbers(), self.lambda_)
        rows = rows if self._everywhere else max(rows, 1)
        aside = side_stream.is_allowed()
        with side_stream.beside(total, aside):
            factor = factor_op(total, total.new_full((1,), rows), self._everywhere, self.lambda_, self.label)
        return PreconditionWeight.apply(weight, factor, aside)

    def begin_accumulation(self) -> None:
        """Gather gradient and statistics instead of applying them."""
        super().begin_accumulation()
        weights = self.weights()
        if not all(weight.is_leaf for weight in weights.values()):
            raise RuntimeError(
                f"TrAct layer {self.label}: expected a weight that is a parameter, got one that is computed from "
                "others; remove the parametrization, or do without tract.accumulate."
            )
        self._gathered = Gathered(weights, self._geometry(), self._everywhere, self.lambda_)

    def gathered_gradients(self, gathered: Gathered) -> dict[str, Tensor]:
        """The TrAct gradient of all micro-batches."""
        weights, products = self.weights(), gathered.gradients(self.label)
        return {name: sharded_like(weights[name], p) for name, p in products.items() if weights[name].requires_grad}

    def plain(self) -> nn.Module:
        """The plain layer with the same tensors, hooks and options."""
        plain_type = vars(type(self)).get("plain_type")
        if plain_type is None:
            raise TypeError(
                f"expected a TrAct layer as TrAct() makes it, got {type(self).__name__}; remove the parametrization "
                "first."
            )
        return without(same_state(self, plain_type), *_OWN_STATE)

    def extra_repr(self) -> str:
        """The plain layer's options and lambda_."""
        return f"{super().extra_repr()}, lambda_={self.lambda_:g}"


class TrActLinear(TrActLayer, nn.Linear):
    """nn.Linear with the TrAct weight gradient.

    Takes nn.Linear's arguments and ``lambda_`` (or ``l``, the same) and ``statistics`` by
    keyword. Input (..., in_features): every leading position counts as one row.

    Example:
        >>> layer = TrActLinear(48, 384, lambda_=0.1)
        >>> layer(torch.zeros(2, 64, 48)).shape
        torch.Size([2, 64, 384])

    Raises:
        ValueError: lambda_ is not a positive finite number, or given twice.
    """

    plain_type = nn.Linear

    def __init__(self, *args, lambda_=None, l=None, statistics: Statistics = "global", **kwargs):  # noqa: E741
        super().__init__(*args, **kwargs)
        self._configure(lambda_, l, statistics)

    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _TrActConv(TrActLayer):
    def _plain_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class TrActConv1d(_TrActConv, nn.Conv1d):
    """nn.Conv1d with the TrAct weight gradient; arguments as in :class:`TrActLinear`."""

    plain_type = nn.Conv1d

    def __init__(self, *args, lambda_=None, l=None, statistics: Statistics = "global", **kwargs):  # noqa: E741
        super().__init__(*args, **kwargs)
        self._configure(lambda_, l, statistics)


class TrActConv2d(_TrActConv, nn.Conv2d):
    """nn.Conv2d with the TrAct weight gradient; arguments as in :class:`TrActLinear`."""

    plain_type = nn.Conv2d

    def __init__(self, *args, lambda_=None, l=None, statistics: Statistics = "global", **kwargs):  # noqa: E741
        super().__init__(*args, **kwargs)
        self._configure(lambda_, l, statistics)


class TrActConv3d(_TrActConv, nn.Conv3d):
    """nn.Conv3d with the TrAct weight gradient; arguments as in :class:`TrActLinear`."""

    plain_type = nn.Conv3d

    def __init__(self, *args, lambda_=None, l=None, statistics: Statistics = "global", **kwargs):  # noqa: E741
        super().__init__(*args, **kwargs)
        self._configure(lambda_, l, statistics)


WRAPPED = {kind.plain_type: kind for kind in (TrActLinear, TrActConv1d, TrActConv2d, TrActConv3d)}
_OWN_STATE = ("lambda_", "statistics", "label", "_gathered")


def TrAct(  # noqa: N802
    layer: nn.Module,
    lambda_: float | None = None,
    *,
    l: float | None = None,  # noqa: E741
    statistics: Statistics = "global",
) -> TrActLayer:
    """Wrap a layer: the same parameters, forward pass and options, with the TrAct weight gradient.

    Equation: G -> G (X^T X / b + lambda I)^-1 (arXiv 2410.23970, section 3), G of shape
    (g, m, n), X of shape (g, b, n), over the global batch. With groups, one factor per group.

    X holds the rows of one forward pass. A layer that is called several times in a step, or
    whose step has several backward passes, needs :func:`tract.accumulate` around them, which
    takes the rows of all together.

    Args:
        layer: an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        lambda_: the damping, 0.1 by default.
        l: the same as ``lambda_``, as in torch_tract.
        statistics: "global" or "local", see :class:`TrActLayer`.

    Returns:
        A new layer (still an instance of the plain class) that shares the very same
        Parameter objects, hooks, training flag and state-dict keys.

    Raises:
        ValueError: lambda_ is not a positive finite number, or given twice.
        TypeError: the layer is of another type, wrapped already, lazy or parametrized.

    Example:
        >>> plain = nn.Conv2d(3, 64, 3)
        >>> wrapped = TrAct(plain, l=0.1)
        >>> isinstance(wrapped, nn.Conv2d), wrapped.weight is plain.weight
        (True, True)
    """
    _require_wrappable(layer)
    wrapped = same_state(layer, _wrapped_type(layer))
    wrapped._configure(lambda_, l, statistics)
    return wrapped


def tract_layers(model: nn.Module) -> Iterator[TrActLayer]:
    """All TrAct layers of a model, each once."""
    return (module for module in model.modules() if isinstance(module, TrActLayer))


def same_state(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of another class with the same tensors, hooks and options.

    The tables that name tensors are its own. The tables of hooks are shared, so that the handle of a hook
    still removes it.
    """
    twin = kind.__new__(kind)
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    for name, value in vars(layer).items():
        twin.__dict__[name] = value.copy() if name in tables else value
    return twin


def without(layer: nn.Module, *names: str) -> nn.Module:
    """The layer without these attributes."""
    for name in names:
        del layer.__dict__[name]
    return layer


def _wrapped_type(layer: nn.Module) -> type[TrActLayer] | None:
    """The TrAct class of a layer's class, which other layers than the plain ones know themselves."""
    return WRAPPED.get(type(layer)) or vars(type(layer)).get("tract_type")


def _require_wrappable(layer: nn.Module) -> None:
    kind = type(layer)
    if isinstance(layer, TrActLayer):
        raise TypeError(f"expected a plain layer, got {kind.__name__}, which has TrAct already; wrap a layer once.")
    if _wrapped_type(layer) is None:
        if isinstance(layer, OwnedLayer):
            raise TypeError(f"TrAct: expected a plain layer, {taken(layer)}")
        known = ", ".join(f"nn.{plain.__name__}" for plain in WRAPPED)
        cure = "wrap the layer that receives the images."
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            cure = "run one forward pass first, so that the lazy layer knows its shape."
        elif isinstance(layer, tuple(WRAPPED)):
            cure = "remove the parametrization or use the plain class, since a subclass may compute something else."
        raise TypeError(f"TrAct supports {known}, got {kind.__name__}; {cure}")
    if "weight" not in layer._parameters:
        raise TypeError(
            f"expected a {kind.__name__} whose weight is a parameter, got one that is computed from others "
            "(weight norm, pruning); remove the parametrization."
        )


def checked_options(lambda_: float | None, l: float | None, statistics: Statistics) -> tuple[float, Statistics]:  # noqa: E741
    """The damping under either name, or the default, and the statistics.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    if lambda_ is not None and l is not None:
        raise ValueError("lambda_ and l mean the same; give one of them.")
    value = next((v for v in (lambda_, l) if v is not None), DEFAULT_LAMBDA)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected a number for lambda_, got {value!r}; the paper uses 0.05, 0.1 or 0.2.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected lambda_ > 0 and finite, got {value}; the paper uses 0.05, 0.1 or 0.2.")
    if statistics not in ("global", "local"):
        raise ValueError(f'expected statistics="global" or "local", got {statistics!r}.')
    return float(value), statistics


def geometry_of(layer: nn.Module) -> Geometry:
    """How an nn.Linear or a convolution cuts rows out of its input."""
    if isinstance(layer, nn.Linear):
        return Geometry(layer.in_features)
    return Geometry(
        layer.in_channels,
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        _padding_pairs(layer.padding, layer.kernel_size, layer.dilation),
        layer.padding_mode,
        layer.groups,
    )


def _padding_pairs(padding, kernel, dilation) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in padding)
