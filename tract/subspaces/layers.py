"""Layers whose weights are a point of a subspace (arXiv 2102.10472): W = sum_i c_i W_i, then the plain layer.

The endpoints W_i are the parameters ``weight``, ``weight1``, ... (and ``bias``, ``bias1``, ...) of the layer, so
that the state dict of endpoint 0 has the plain names. The gradient of endpoint i is c_i times the plain one, or,
where the layer has TrAct, c_i times the TrAct gradient G (X^T X / b + lambda I)^-1 at the point. All points share
the running statistics of a batch norm, and whatever is no subspace layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tract.layers import TrActConv1d, TrActConv2d, TrActConv3d, TrActLayer, TrActLinear, same_state
from tract.owned import OwnedLayer, taken
from tract.subspaces.paths import Path
from tract.surgery import replace_module, require_state_dict


@torch.library.custom_op("tract::held", mutates_args=())
def held(x: Tensor) -> Tensor:
    """A copy that torch.compile leaves a copy; it takes a clone for the tensor itself, whatever becomes of that."""
    return x.clone()


@held.register_fake
def _(x):
    return torch.empty_like(x)


class SubspaceLayer(OwnedLayer):
    """What all subspace layers share; :func:`apply_subspace` makes them of plain ones.

    Attributes:
        path: the kind of subspace.
        mixed: the parameters that have endpoints, of "weight" and "bias".
        coefficients: the point, of shape (endpoints,); filled in place by :func:`set_coefficients`.
    """

    method = "a line, curve or simplex"
    tract_type: ClassVar[type[TrActLayer]]
    path: Path
    mixed: tuple[str, ...]
    coefficients: Tensor

    def endpoint(self, name: str, index: int) -> nn.Parameter:
        """Endpoint ``index`` of "weight" or "bias"."""
        return getattr(self, endpoint_name(name, index))

    def weights(self) -> dict[str, Tensor]:
        """The endpoints of the weight by name."""
        names = (endpoint_name("weight", index) for index in range(self.path.endpoints))
        return {name: getattr(self, name) for name in names}

    def point(self, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias at the coefficients; with one endpoint, the parameters themselves.

        Args:
            weights: what stands for :meth:`weights`.
        """
        weights = self.weights() if weights is None else weights
        if self.path.endpoints == 1:
            return weights["weight"], self.bias
        # A copy, since the backward pass needs these values also where the next forward pass has others.
        copied = held(self.coefficients) if torch.compiler.is_compiling() else self.coefficients.clone()
        shares = copied.unbind()
        bias = _mixture(shares, _endpoints(self, "bias")) if "bias" in self.mixed else self.bias
        return _mixture(shares, list(weights.values())), bias

    def extra_repr(self) -> str:
        """The plain layer's options and the subspace."""
        return f"{super().extra_repr()}, {self.path}"


class SubspaceLinear(SubspaceLayer, nn.Linear):
    """nn.Linear at a point of a subspace."""

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output with W = sum_i c_i W_i."""
        return F.linear(x, *self.point())


class _SubspaceConv(SubspaceLayer):
    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output with W = sum_i c_i W_i."""
        return self._conv_forward(x, *self.point())


class SubspaceConv1d(_SubspaceConv, nn.Conv1d):
    """nn.Conv1d at a point of a subspace."""


class SubspaceConv2d(_SubspaceConv, nn.Conv2d):
    """nn.Conv2d at a point of a subspace."""


class SubspaceConv3d(_SubspaceConv, nn.Conv3d):
    """nn.Conv3d at a point of a subspace."""


class _SubspaceBatchNorm(SubspaceLayer):
    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output; all points share the running statistics."""
        self._check_input_dim(x)
        own = self.running_mean is not None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and own and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches until now
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, variance = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            mean = variance = None
        weight, bias = self.point()
        return F.batch_norm(x, mean, variance, weight, bias, self.training or not own, momentum, self.eps)


class TrActSubspaceLayer(SubspaceLayer, TrActLayer):
    """What the subspace layers with TrAct share: all endpoints have the second moment of all rows."""

    method = "TrAct"

    def _made_of(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return self.point(weights)

    def result_weight(self) -> Tensor:
        """The weight at the midpoint."""
        shares = self.coefficients.new_tensor(self.path.coefficients(*self.path.midpoint()))
        return _mixture(shares.unbind(), list(self.weights().values()))


class TrActSubspaceLinear(TrActSubspaceLayer, TrActLinear):
    """TrActLinear at a point of a subspace."""

    plain_type = SubspaceLinear


class TrActSubspaceConv1d(TrActSubspaceLayer, TrActConv1d):
    """TrActConv1d at a point of a subspace."""

    plain_type = SubspaceConv1d


class TrActSubspaceConv2d(TrActSubspaceLayer, TrActConv2d):
    """TrActConv2d at a point of a subspace."""

    plain_type = SubspaceConv2d


class TrActSubspaceConv3d(TrActSubspaceLayer, TrActConv3d):
    """TrActConv3d at a point of a subspace."""

    plain_type = SubspaceConv3d


class SubspaceBatchNorm1d(_SubspaceBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d at a point of a subspace."""


class SubspaceBatchNorm2d(_SubspaceBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d at a point of a subspace."""


class SubspaceBatchNorm3d(_SubspaceBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d at a point of a subspace."""


class SubspaceLayerNorm(SubspaceLayer, nn.LayerNorm):
    """nn.LayerNorm at a point of a subspace."""

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output with W = sum_i c_i W_i."""
        return F.layer_norm(x, self.normalized_shape, *self.point(), self.eps)


WITH_MATRIX = {
    nn.Linear: SubspaceLinear,
    nn.Conv1d: SubspaceConv1d,
    nn.Conv2d: SubspaceConv2d,
    nn.Conv3d: SubspaceConv3d,
}
NORMS = {
    nn.BatchNorm1d: SubspaceBatchNorm1d,
    nn.BatchNorm2d: SubspaceBatchNorm2d,
    nn.BatchNorm3d: SubspaceBatchNorm3d,
    nn.LayerNorm: SubspaceLayerNorm,
}
WITH_TRACT = {
    TrActLinear: TrActSubspaceLinear,
    TrActConv1d: TrActSubspaceConv1d,
    TrActConv2d: TrActSubspaceConv2d,
    TrActConv3d: TrActSubspaceConv3d,
}
for _kind in WITH_TRACT.values():
    _kind.plain_type.tract_type = _kind
KINDS = WITH_MATRIX | NORMS
_ALL = KINDS | WITH_TRACT
_PLAIN = {kind: plain for plain, kind in _ALL.items()}
_NAMES = ("weight", "bias")


def endpoint_name(name: str, index: int) -> str:
    """The name of an endpoint's parameter: weight, weight1, weight2, ..."""
    return f"{name}{index}" if index else name


def subspace_layers(model: nn.Module) -> list[SubspaceLayer]:
    """All subspace layers of a model, each once, in the order of ``modules()``."""
    return [module for module in model.modules() if isinstance(module, SubspaceLayer)]


def apply_subspace(model: nn.Module, path: Path, others: Sequence[nn.Module], shared_bias: bool = False) -> list[str]:
    """Give every linear, convolution, batch norm and layer norm of a model endpoints, in place.

    Endpoint 0 has the model's own Parameter objects. The point is the midpoint until
    :func:`set_coefficients`. Layers with TrAct keep it, and may get it later. Layers of other classes (subclasses,
    lazy or parametrized ones, other norms) and layers that share a parameter with one of them keep one value for all
    points.

    Args:
        model: any module that contains such a layer.
        path: the kind of subspace.
        others: one model for each further endpoint, made by the model's own constructor; their values are copied.
        shared_bias: linear layers and convolutions have one bias for all points, as in the authors' code.

    Returns:
        Sentences that say what was done, and what all points share.

    Raises:
        ValueError: another number of models than the path needs, a model that is built otherwise, none of these
            layers, or layers of another method but TrAct.

    Example:
        >>> from tract.subspaces.paths import Line
        >>> model, other = (nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> apply_subspace(model, Line(), [other])
        ['2 layers with 2 endpoints each: Line().', '1 parameter shared by all points: 1.weight.']
    """
    if len(others) != path.endpoints - 1:
        raise ValueError(
            f"expected {path.endpoints - 1} further models for the endpoints of {path}, got {len(others)}; "
            "make each by the model's own constructor."
        )
    if subspace_layers(model):
        raise ValueError(
            "expected a plain model, got one with subspace layers already; use one subspace, or plain_at, which gives "
            "a plain model."
        )
    for name, layer in model.named_modules():
        if isinstance(layer, OwnedLayer) and not isinstance(layer, TrActLayer):
            raise ValueError(f"a subspace: expected layers that are plain or have TrAct, {taken(layer, name)}")
    layers = _supported(model)
    if not layers:
        raise ValueError(
            f"expected a model that contains one of {', '.join(kind.__name__ for kind in KINDS)} with parameters, got "
            f"{type(model).__name__} with none; put a lone layer into nn.Sequential."
        )
    tables = [dict(other.named_modules()) for other in others]
    memo: dict[tuple[int, int], nn.Parameter] = {}  # tied parameters have tied endpoints
    twins = []
    for name, layer in layers.items():
        mixed = tuple(n for n in _NAMES if n == "weight" or not (shared_bias and isinstance(layer, tuple(WITH_MATRIX))))
        mixed = tuple(n for n in mixed if layer._parameters[n] is not None)
        twin = same_state(layer, _ALL[type(layer)])
        twin.path, twin.mixed = path, mixed
        for index, table in enumerate(tables, 1):
            for parameter in mixed:
                value = _value(f"{name}.{parameter}", layer, table.get(name), index)
                if (index, id(value)) not in memo:
                    memo[index, id(value)] = _parameter(value.detach(), layer._parameters[parameter])
                twin.register_parameter(endpoint_name(parameter, index), memo[index, id(value)])
        point = torch.tensor(path.coefficients(*path.midpoint()), dtype=torch.float64).to(layer.weight)
        twin.register_buffer("coefficients", point, persistent=False)
        twins.append((layer, twin))
    for layer, twin in twins:
        replace_module(model, layer, twin)
    done = [f"{_count(len(twins), 'layer')} with {path.endpoints} endpoints each: {path}."]
    mixed = {id(p) for layer in subspace_layers(model) for n in layer.mixed for p in _endpoints(layer, n)}
    shared = [name for name, parameter in model.named_parameters() if id(parameter) not in mixed]
    if shared:
        named = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
        done.append(f"{_count(len(shared), 'parameter')} shared by all points: {named}.")
    return done


def set_coefficients(model: nn.Module, coefficients: Sequence[float]) -> None:
    """Put all subspace layers at the same point, in place.

    Args:
        model: has subspace layers.
        coefficients: one number for each endpoint, as of ``path.coefficients(...)``.

    Raises:
        ValueError: no subspace layers, or another number of coefficients.
    """
    layers = _required(model)
    _fill(layers, [tuple(coefficients)] * len(layers))


def set_coefficients_layerwise(model: nn.Module, draws: Sequence[Sequence[float]]) -> None:
    """Put every subspace layer at a point of its own, in place.

    Args:
        model: has subspace layers.
        draws: coefficients for each of :func:`subspace_layers`, in that order.

    Raises:
        ValueError: no subspace layers, or another number of points or coefficients.
    """
    layers = _required(model)
    if len(draws) != len(layers):
        raise ValueError(f"expected a point for each of {len(layers)} subspace layers, got {len(draws)}.")
    _fill(layers, [tuple(draw) for draw in draws])


def plain_at(model: nn.Module, *alpha: float) -> nn.Module:
    """A point of the subspace as a new plain model; the source stays as it is. TrAct stays on its layer.

    ``plain_at(model, 0.3).state_dict()`` exports this point: its keys are the plain model's, in that order.

    Args:
        model: has subspace layers.
        alpha: the point; none of them is the midpoint of a simplex with one endpoint.

    Raises:
        ValueError: no subspace layers, or another number of numbers than the path takes.
    """
    return plain_with(model, _required(model)[0].path.coefficients(*alpha))


def plain_with(model: nn.Module, coefficients: Sequence[float] | Sequence[Sequence[float]]) -> nn.Module:
    """The same for coefficients of the endpoints, or for coefficients of each subspace layer.

    Raises:
        ValueError: as :func:`set_coefficients` and :func:`set_coefficients_layerwise`.
    """
    model = copy.deepcopy(model)
    everywhere = len(coefficients) > 0 and isinstance(coefficients[0], Real)
    (set_coefficients if everywhere else set_coefficients_layerwise)(model, coefficients)
    memo: dict[Any, nn.Parameter] = {}  # tied parameters stay tied where their points are the same
    for layer in subspace_layers(model):
        plain = same_state(layer, _PLAIN[type(layer)])
        del plain.path, plain.mixed, plain.coefficients
        for name, value in zip(_NAMES, layer.point(), strict=True):
            if name not in layer.mixed or layer.path.endpoints == 1:
                continue
            key = (*map(id, _endpoints(layer, name)), *layer.coefficients.tolist())
            if key not in memo:
                memo[key] = _parameter(value.detach(), layer._parameters[name])
            plain._parameters[name] = memo[key]
            for index in range(1, layer.path.endpoints):
                del plain._parameters[endpoint_name(name, index)]
        replace_module(model, layer, plain)
    return model


@torch.no_grad()
def load_endpoint(model: nn.Module, index: int, state_dict: dict[str, Tensor]) -> None:
    """Give an endpoint the values of a plain model's state dict.

    What all points share (running statistics, parameters without endpoints) stays as it is.

    Args:
        model: has subspace layers.
        index: the endpoint, from 0.
        state_dict: of a plain model of the same architecture.

    Raises:
        ValueError: no subspace layers, no such endpoint, or a state dict that does not fit.
    """
    count = _required(model)[0].path.endpoints
    if not 0 <= index < count:
        raise ValueError(f"expected an endpoint from 0 to {count - 1}, got {index}.")
    targets, further = {}, set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SubspaceLayer):
            prefix = f"{name}." if name else ""
            for parameter in layer.mixed:
                targets[prefix + parameter] = layer.endpoint(parameter, index)
                further |= {prefix + endpoint_name(parameter, other) for other in range(1, count)}
    expected = dict.fromkeys(model.state_dict().keys() - further)
    require_state_dict(state_dict, expected | {name: target.shape for name, target in targets.items()})
    for name, target in targets.items():
        target.copy_(state_dict[name])


def _supported(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that can have endpoints, by name: exactly of a plain class, with parameters of their own."""
    named = dict(model.named_modules())
    fit = {n for n, m in named.items() if n and type(m) in _ALL and tuple(m._parameters) == _NAMES}
    fit = {n for n in fit if named[n].weight is not None}
    elsewhere = {id(p) for n, m in named.items() if n not in fit for p in m._parameters.values()}
    return {n: m for n, m in named.items() if n in fit and not any(id(p) in elsewhere for p in m._parameters.values())}


def _value(name: str, layer: nn.Module, other: nn.Module | None, index: int) -> Tensor:
    own, key = layer._parameters, name.rpartition(".")[2]
    same_kind = type(other) in (type(layer), getattr(layer, "plain_type", None))  # with or without TrAct
    value = other._parameters.get(key) if same_kind else None
    if value is None or value.shape != own[key].shape:
        got = "no such layer" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(
            f"endpoint {index}: expected a {type(layer).__name__} with {name} of shape {tuple(own[key].shape)}, "
            f"got {got}; make the model by the same constructor."
        )
    return value


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    value = value.to(device=like.device, dtype=like.dtype, copy=True)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _mixture(shares: Sequence[Tensor], endpoints: Sequence[Tensor]) -> Tensor:
    total = shares[0] * endpoints[0]
    for share, endpoint in zip(shares[1:], endpoints[1:], strict=True):
        total = torch.addcmul(total, share, endpoint)
    return total


def _endpoints(layer: SubspaceLayer, name: str) -> list[nn.Parameter]:
    return [layer.endpoint(name, index) for index in range(layer.path.endpoints)]


def _required(model: nn.Module) -> list[SubspaceLayer]:
    layers = subspace_layers(model)
    if not layers:
        raise ValueError("expected a model with subspace layers, got none; call apply_subspace first.")
    return layers


@torch.no_grad()
def _fill(layers: list[SubspaceLayer], points: list[tuple[float, ...]]) -> None:
    count = layers[0].path.endpoints
    for point in points:
        if len(point) != count:
            raise ValueError(f"expected {count} coefficients, one for each endpoint, got {len(point)}: {point}.")
    table = torch.tensor(points, dtype=torch.float64)
    tables: dict[torch.device, Tensor] = {}  # one transfer to each device
    for row, layer in enumerate(layers):
        device = layer.coefficients.device
        if device not in tables:
            pinned = table.pin_memory() if device.type == "cuda" else table  # or the host would wait
            tables[device] = pinned.to(device, non_blocking=True)
        layer.coefficients.copy_(tables[device][row])
