"""ProxProp layers: proximal instead of explicit gradient steps on a layer's parameters.

Proximal backpropagation (Frerix, Moellenhoff, Moeller, Cremers, ICLR 2018, arXiv 1706.04638).
A layer that is linear in its parameters computes z = A theta, with its input in A. With
g = dL/dz, the proximal step of size tau (equation 12 there, for the output z - g) is

    theta' = argmin 1/2 |A theta' - (A theta - g)|^2 + 1/(2 tau) |theta' - theta|^2,

and theta - theta' is handed to the optimizer as "the gradient". It is the solution D of

    (A^T A + I / tau) D = A^T g,

where A^T g is the plain gradient. This increment is what is computed here, from the plain
gradient; the difference of two nearly equal sets of parameters never appears. The forward pass
and the input's gradient are the plain layer's. A^T A is a sum over all rows of the batch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tract.conjugate_gradients import VARIANTS, Variant, conjugate_gradients
from tract.damped_solve import damped_solve, damped_solve_rows
from tract.distributed import all_rows_if_few, global_sum, mean_over_ranks, world_size
from tract.finite import require
from tract.gathered import Gathering
from tract.layers import Statistics, geometry_of, same_state, without
from tract.ops import FirstDerivativeOnly, GradientApart, first_derivative
from tract.owned import OwnedLayer, taken
from tract.second_moment import Geometry, second_moment, unfold

DEFAULT_TAU = 1.0
DEFAULT_MODE = "prox_cg1"
_MOST_EXACT = 4096  # parameters of a layer of any kind whose A^T A is built column by column
_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OWN_STATE = ("tau", "mode", "variant", "statistics", "label", "_gathered", "_checked")

Tensors = dict[str, Tensor]
Inputs = tuple[Any, ...]


class ProxPropLayer(Gathering):
    """What all ProxProp layers share; make one with :func:`proxprop_layer` or :func:`ProxProp`.

    Attributes:
        tau: step size of the proximal step, > 0.
        mode: "prox_exact", "prox_cgN" (N iterations of conjugate gradients) or "gradient".
        variant: which conjugate gradients, see :func:`tract.conjugate_gradients.conjugate_gradients`.
        statistics: "global" sums A^T A over all ranks of the process group, "local" takes this rank's.
        label: the name used in error messages.
    """

    method = "ProxProp"
    plain_type: type[nn.Module]

    def _configure(self, tau: float, mode: str, variant: Variant, statistics: Statistics) -> None:
        self.tau, self.mode = checked_tau(tau), checked_mode(mode)
        if variant not in VARIANTS:
            raise ValueError(f"expected variant to be one of {', '.join(VARIANTS)}, got {variant!r}.")
        if statistics not in ("global", "local"):
            raise ValueError(f'expected statistics="global" or "local", got {statistics!r}.')
        self.variant, self.statistics, self.label = variant, statistics, type(self).__name__
        self._gathered = None
        self._checked = isinstance(self, _ROWS)  # these are linear; others show it in their first pass
        if self._modules or not self._parameters:
            raise TypeError(
                f"expected a layer with parameters of its own and no layers inside, got {self.plain_type.__name__}."
            )
        if isinstance(self, _ROWS) and "weight" not in self._parameters:
            raise TypeError(
                f"expected a {self.plain_type.__name__} whose weight is a parameter, got one that is computed from "
                "others (weight norm, pruning); remove the parametrization."
            )
        size = sum(parameter.numel() for parameter in self.parameters())
        if self.mode == "prox_exact" and not isinstance(self, _ROWS) and size > _MOST_EXACT:
            raise ValueError(
                f"expected at most {_MOST_EXACT} parameters for prox_exact of {self.plain_type.__name__}, whose A^T A "
                f"is built column by column, got {size}; use prox_cgN."
            )

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        state_dict.pop(f"{prefix}tau_prox", None)  # a buffer of the original's layers; ours is an option
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The plain layer's output; the parameters' gradients will be the increment."""
        if named:
            inputs = inspect.signature(self.plain_type.forward).bind(self, *inputs, **named).args[1:]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters.values() if p is not None)
        if self.mode == "gradient" or not trains:
            return super().forward(*inputs)
        return self._training_forward(*inputs)

    @torch._disable_dynamo  # the backward pass calls the layer itself; as in tract.distributed
    def _training_forward(self, *inputs: Any) -> Any:
        if any(hasattr(parameter, "device_mesh") for parameter in self.parameters()):
            raise RuntimeError(
                f"ProxProp layer {self.label}: expected whole parameters, got shards of fully_shard; use "
                "DistributedDataParallel."
            )
        parameters = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}
        constants = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self._check(constants)
        if self._gathered is not None:
            replaced = self._gathered.take(constants, parameters)
        else:
            system = self._system([constants]) if self._is_exact else None
            tensors = [x for x in constants if isinstance(x, Tensor)]
            places = [i for i, x in enumerate(constants) if isinstance(x, Tensor)]
            others = [None if isinstance(x, Tensor) else x for x in constants]
            taken = _Increment.apply(self, system, places, others, len(tensors), *tensors, *parameters.values())
            replaced = dict(zip(parameters, taken, strict=True))
        with self._holding(replaced):
            return FirstDerivativeOnly.apply(super().forward(*inputs))

    # -- the layer as a linear map of its parameters ----------------------------------

    @contextmanager
    def _holding(self, tensors: Tensors) -> Iterator[None]:
        """The layer with these tensors in place of parameters or buffers."""
        tables = {table: vars(self)[table] for table in ("_parameters", "_buffers")}
        vars(self).update({name: {k: tensors.get(k, v) for k, v in table.items()} for name, table in tables.items()})
        try:
            yield
        finally:
            vars(self).update(tables)

    def _image(self, directions: Tensors, inputs: Inputs) -> Tensor:
        """A d: the layer's output with a direction for its parameters, and zero where they are frozen."""
        kind = next(iter(directions.values()))
        # Copies, so that running statistics stay as they are.
        copies = {name: buffer.clone() for name, buffer in self.named_buffers()}
        buffers = {name: b.to(kind.dtype) if b.is_floating_point() else b for name, b in copies.items()}
        frozen = {n: torch.zeros_like(p, dtype=kind.dtype) for n, p in self._parameters.items() if p is not None}
        inputs = [x.to(kind.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        with self._holding(buffers | frozen | directions), torch.autocast(kind.device.type, enabled=False):
            return super().forward(*inputs)

    def _check(self, inputs: Inputs) -> None:
        """A layer of any kind is linear in its parameters: f(2 a - b) = 2 f(a) - f(b) and f(0) = 0."""
        if self._checked:
            return
        names = [name for name, parameter in self._parameters.items() if parameter is not None]
        sizes = {name: self._parameters[name] for name in names}
        a, b = ({n: _wave(p, phase) for n, p in sizes.items()} for phase in (0.0, 1.0))
        mixed = {name: 2 * a[name] - b[name] for name in names}
        with torch.no_grad():
            zero = self._image({name: torch.zeros_like(tensor) for name, tensor in a.items()}, inputs)
            of_a, of_b, of_mixed = (self._image(tensors, inputs) for tensors in (a, b, mixed))
        if not of_a.numel():
            return
        scale = 1e-4 * (of_a.abs().max() + of_b.abs().max() + torch.finfo(of_a.dtype).tiny)
        if zero.abs().max() > scale or (of_mixed - 2 * of_a + of_b).abs().max() > scale:
            raise TypeError(
                f"ProxProp layer {self.label}: expected a layer that is linear in its parameters, got "
                f"{self.plain_type.__name__}, whose outputs do not add up; leave it a plain layer."
            )
        self._checked = True

    # -- increments -------------------------------------------------------------------

    @property
    def _everywhere(self) -> bool:
        return self.statistics == "global" and world_size() > 1

    @property
    def _has_rows(self) -> bool:
        return isinstance(self, _ROWS)

    @property
    def _is_exact(self) -> bool:
        return self.mode == "prox_exact" and not self._trains_bias_alone

    @property
    def _trains_bias_alone(self) -> bool:
        """A^T A is then b I, and one iteration is exact."""
        return self._has_rows and not self.weight.requires_grad

    def _names(self) -> list[str]:
        return [name for name, p in self._parameters.items() if p is not None and p.requires_grad]

    @torch.no_grad()
    def _system(self, batches: Sequence[Inputs]) -> tuple[Tensor | None, Tensor | None]:
        """A^T A over all ranks, (g, n, n), float64; or the rows, (g, n, b), where they are few and this rank's only."""
        if not self._has_rows:
            columns = self._columns(batches)
            moment = columns @ columns.mT
        else:
            pairs = [self._rows(inputs) for inputs in batches]
            _, geometry = pairs[0]
            few = sum(geometry.count_rows(x) for x, geometry in pairs) < geometry.row_length
            rows = torch.cat([unfold(x, geometry) for x, geometry in pairs], dim=-1) if few else None
            if self._everywhere:  # n x n numbers are exchanged unless they are too many
                known = (rows, geometry.groups, geometry.row_length, pairs[0][0].device)
                rows = all_rows_if_few(*known) if geometry.is_long else None
            if rows is not None:
                return None, self._finite(rows)
            products = torch.float32 if pairs[0][0].is_cuda else torch.float64  # many GPUs have few float64 units
            moment = sum(second_moment(x, geometry, products) for x, geometry in pairs)
        return self._finite(global_sum(moment, self._everywhere)), None

    def _finite(self, system: Tensor) -> Tensor:
        require(
            torch.isfinite(system.sum()),
            f"ProxProp layer {self.label}: expected finite inputs (with finite squares), got inf or nan; check the "
            "data and its normalisation, and the loss of the steps before.",
        )
        return system

    def _rows(self, inputs: Inputs) -> tuple[Tensor, Geometry]:
        """An input and how rows are cut out of it, each with a one at its end where a bias trains."""
        ones = self.bias is not None and self.bias.requires_grad
        if not isinstance(self, _TRANSPOSED):
            return inputs[0], replace(geometry_of(self), ones=ones)
        x = _stuffed(self, inputs[0])
        return x, replace(_stuffed_geometry(self, x, *inputs[1:]), ones=ones)

    def _columns(self, batches: Sequence[Inputs]) -> Tensor:
        """A^T as (1, parameters, outputs), a row for each parameter, float64."""
        found = []
        for name in self._names():
            shape, size = self._parameters[name].shape, self._parameters[name].numel()
            for index in range(size):
                unit = {n: torch.zeros_like(self._parameters[n], dtype=torch.float64) for n in self._names()}
                unit[name] = F.one_hot(torch.tensor(index), size).to(unit[name]).view(shape)
                found.append(torch.cat([self._image(unit, inputs).flatten() for inputs in batches]))
        return torch.stack(found)[None]

    @torch.no_grad()
    def _increments(self, gradients: Tensors, batches: Sequence[Inputs], system: tuple | None) -> Tensors:
        """D for plain gradients A^T g: with a system of any rank's, else of all ranks together."""
        dtypes = {name: gradient.dtype for name, gradient in gradients.items()}
        increments = self._iterated(gradients, batches) if system is None else self._exact(gradients, system)
        return {name: increment.to(dtypes[name]).contiguous() for name, increment in increments.items()}

    def _exact(self, gradients: Tensors, system: tuple[Tensor, Tensor | None]) -> Tensors:
        moment, rows = system
        matrix = self._as_matrix(gradients)
        if rows is None:
            product, succeeded = damped_solve(matrix, moment, 1 / self.tau)
        else:
            count = rows.shape[-1]
            product, succeeded = damped_solve_rows(matrix, rows, 1 / (self.tau * max(1, count)))
            product = product / max(1, count) if count else self.tau * matrix
        require(succeeded, f"ProxProp layer {self.label}: A^T A + 1/tau could not be factorised; lower tau.")
        return self._from_matrix(product, gradients)

    def _as_matrix(self, tensors: Tensors) -> Tensor:
        """Parameters as (g, m, n), float64, so that each row multiplies the same A^T A."""
        if not self._has_rows:
            return torch.cat([tensor.double().flatten() for tensor in tensors.values()])[None, None]
        weight = _as_conv(self, tensors["weight"].double())
        groups = getattr(self, "groups", 1)
        weight = weight.reshape(groups, weight.shape[0] // groups, -1)
        if "bias" not in tensors:
            return weight
        return torch.cat([weight, tensors["bias"].double().reshape(groups, -1, 1)], dim=-1)

    def _from_matrix(self, matrix: Tensor, like: Tensors) -> Tensors:
        if not self._has_rows:
            parts = matrix.flatten().split([tensor.numel() for tensor in like.values()])
            return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}
        found = {}
        if "bias" in like:
            found["bias"] = matrix[..., -1].reshape(like["bias"].shape)
            matrix = matrix[..., :-1]
        return {"weight": _from_conv(self, matrix, like["weight"].shape)} | found

    def _iterated(self, gradients: Tensors, batches: Sequence[Inputs]) -> Tensors:
        """N iterations; for nn.Linear one system per output unit, else one for all parameters."""
        per_unit = isinstance(self, nn.Linear)
        steps = 1 if self._trains_bias_alone else int(self.mode.removeprefix("prox_cg"))
        variant = "standard" if self.mode == "prox_exact" else self.variant
        # The layer computes in float32 at least; what the iterations add up is float64.
        wide = torch.promote_types(next(iter(gradients.values())).dtype, torch.float32)

        def packed(tensors: Iterable[Tensor]) -> Tensor:
            if per_unit:
                return torch.cat([tensor.reshape(len(tensor), -1).double() for tensor in tensors], dim=1)
            return torch.cat([tensor.flatten().double() for tensor in tensors])[None]

        def unpacked(vector: Tensor) -> Tensors:
            sizes = [g.numel() // len(vector) for g in gradients.values()]
            parts = vector.split(sizes, dim=1)
            return {name: part.reshape(gradients[name].shape) for name, part in zip(gradients, parts, strict=True)}

        def normal(vector: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
            leaves = {name: part.to(wide).requires_grad_() for name, part in unpacked(vector).items()}
            with torch.enable_grad():
                images = [self._image(leaves, inputs) for inputs in batches]
            rows = [image.detach().reshape(-1, image.shape[-1] if per_unit else 1) for image in images]
            squared = sum(torch.linalg.vector_norm(row, dim=0, dtype=torch.float64).square() for row in rows)

            def transposed() -> Tensor:
                seeds = [image.detach() for image in images]
                return global_sum(packed(torch.autograd.grad(images, list(leaves.values()), seeds)), self._everywhere)

            return global_sum(squared, self._everywhere), transposed

        increments = conjugate_gradients(packed(gradients.values()), normal, 1 / self.tau, steps, variant)
        return unpacked(increments)

    # -- several passes as one batch --------------------------------------------------

    def begin_accumulation(self) -> None:
        """Gather plain gradients and inputs."""
        super().begin_accumulation()
        if self.mode != "gradient":
            self._gathered = _Gathered(self)

    def gathered_gradients(self, gathered: _Gathered) -> Tensors:
        """The increment of all passes together."""
        return gathered.increments()

    def plain(self) -> nn.Module:
        """The plain layer with the same tensors, hooks and options."""
        return without(same_state(self, self.plain_type), *_OWN_STATE)

    def extra_repr(self) -> str:
        """The plain layer's options, tau and mode."""
        return ", ".join(filter(None, (super().extra_repr(), f"tau={self.tau:g}, mode={self.mode}")))


class _Gathered:
    """Plain gradients of a layer's passes, apart from other gradients of its parameters, and its inputs."""

    def __init__(self, layer: ProxPropLayer):
        self._layer = layer
        self._apart: Tensors = {}
        self._batches: list[Inputs] = []
        for name in layer._names():
            parameter = layer._parameters[name]
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            self._apart[name] = zero.expand(parameter.shape).requires_grad_()

    def take(self, inputs: Inputs, parameters: Tensors) -> Tensors:
        """Keep an input (a copy), and return what stands for the parameters in this pass."""
        forgotten = all(parameter.grad is None for parameter in parameters.values())
        if forgotten and any(apart.grad is not None for apart in self._apart.values()):
            self._batches = []  # zero_grad() has forgotten the backward passes until here
            for apart in self._apart.values():
                apart.grad = None
        self._batches.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs))
        return {name: GradientApart.apply(p, self._apart[name]) for name, p in parameters.items()}

    def increments(self) -> Tensors:
        """D over all passes and ranks; nothing without a backward pass on this only rank."""
        layer, world = self._layer, world_size()
        if not self._apart:
            return {}
        if world > 1 and not self._batches:
            raise RuntimeError(
                f"ProxProp layer {layer.label}: expected a forward pass on every rank inside tract.accumulate, got "
                "none on this one; leave such a layer plain."
            )
        if world == 1 and all(apart.grad is None for apart in self._apart.values()):
            return {}
        gradients = {n: a.detach().clone() if a.grad is None else a.grad for n, a in self._apart.items()}
        if world > 1 and layer._everywhere:
            gradients = {name: mean_over_ranks(gradient) for name, gradient in gradients.items()}
        system = layer._system(self._batches) if layer._is_exact else None
        increments = layer._increments(gradients, self._batches, system)
        if world > 1 and not layer._everywhere:
            increments = {name: mean_over_ranks(increment) for name, increment in increments.items()}
        return increments


class _Increment(torch.autograd.Function):
    """Identity on the parameters going forward; plain gradients to the increment going back."""

    @staticmethod
    def forward(ctx, layer, system, places, others, count, *tensors):
        ctx.layer, ctx.system, ctx.places, ctx.others = layer, system, places, others
        inputs, parameters = tensors[:count], tensors[count:]
        ctx.names = layer._names()
        ctx.save_for_backward(*inputs)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients):
        layer, inputs = ctx.layer, list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        plain = {name: gradient.detach() for name, gradient in zip(ctx.names, gradients, strict=True)}
        if layer._everywhere and ctx.system is None:
            plain = {name: mean_over_ranks(gradient.clone()) for name, gradient in plain.items()}
        increments = layer._increments(plain, [tuple(inputs)], ctx.system)
        found = (first_derivative(increments[name]) for name in ctx.names)
        return (None,) * (5 + len(ctx.saved_tensors)) + tuple(found)


# -- transposed convolutions as convolutions of an input with zeros between its elements --


def _stuffed(layer: nn.Module, x: Tensor) -> Tensor:
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros((*x.shape[:2], *sizes))
    wide[(..., *(slice(None, None, step) for step in layer.stride))] = x
    return wide


def _stuffed_geometry(layer: nn.Module, x: Tensor, output_size: Sequence[int] | None = None) -> Geometry:
    options = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    padding = tuple((d * (k - 1) - p, d * (k - 1) - p + extra) for k, d, p, extra in options)
    if output_size is not None:  # torch pads at the end until the output has this size
        sizes = zip(x.shape[2:], output_size[-len(padding) :], layer.kernel_size, layer.dilation, padding, strict=True)
        padding = tuple((before, out - size - before + d * (k - 1)) for size, out, k, d, (before, _) in sizes)
    ones = (1,) * len(layer.kernel_size)
    return Geometry(layer.in_channels, layer.kernel_size, ones, layer.dilation, padding, "zeros", layer.groups)


def _as_conv(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as a convolution has it, (outputs, inputs / groups, *kernel)."""
    if not isinstance(layer, _TRANSPOSED):
        return weight
    kernel = weight.shape[2:]
    parts = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.flip(tuple(range(3, 3 + len(kernel)))).reshape(-1, layer.in_channels // layer.groups, *kernel)


def _from_conv(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(layer, _TRANSPOSED):
        return matrix.reshape(shape)
    kernel = shape[2:]
    parts = matrix.reshape(layer.groups, shape[1], -1, *kernel).transpose(1, 2)
    return parts.flip(tuple(range(3, 3 + len(kernel)))).reshape(shape)


# -- making layers -------------------------------------------------------------------


def proxprop_layer(base: type[nn.Module]) -> type[ProxPropLayer]:
    """The ProxProp version of a layer class that is linear in its parameters.

    The new class takes the arguments of ``base`` and, by keyword, ``tau`` (or ``tau_prox``, 1 by
    default), ``mode`` (or ``optimization_mode``, "prox_cg1" by default), ``variant`` and
    ``statistics``; see :class:`ProxPropLayer`. Its instances are instances of ``base`` with the
    same state-dict keys. ``prox_exact`` factorises a matrix for nn.Linear and (transposed)
    convolutions of any kind, the smaller one of A^T A and the rows' Gram matrix; for other
    layers it builds A^T A column by column. Conjugate gradients cost N + 1 forward passes of the
    layer in all and N - 1 backward passes more.

    Raises:
        TypeError: no layer class; when a layer is made, it has no parameters of its own; in its
            first training pass, it is not linear in them.
        ValueError: (when a layer is made) no such mode, or tau is not a positive finite number.

    Example:
        >>> ProxPropBilinear = proxprop_layer(nn.Bilinear)
        >>> layer = ProxPropBilinear(3, 4, 5, tau_prox=0.1, optimization_mode="prox_cg3")
        >>> layer(torch.ones(2, 3), torch.ones(2, 4)).shape
        torch.Size([2, 5])
    """
    if base in _LAYERS:
        return _LAYERS[base]
    if not (isinstance(base, type) and issubclass(base, nn.Module)) or issubclass(base, ProxPropLayer):
        raise TypeError(f"expected a plain layer class such as nn.Conv3d, got {base!r}.")

    class Generated(ProxPropLayer, base):
        plain_type = base

        def __init__(
            self,
            *args,
            tau: float | None = None,
            tau_prox: float | None = None,
            mode: str | None = None,
            optimization_mode: str | None = None,
            variant: Variant = "standard",
            statistics: Statistics = "global",
            **options,
        ):
            base.__init__(self, *args, **options)
            tau = _one_of("tau", tau, "tau_prox", tau_prox, DEFAULT_TAU)
            mode = _one_of("mode", mode, "optimization_mode", optimization_mode, DEFAULT_MODE)
            self._configure(tau, mode, variant, statistics)

        def __reduce__(self):
            return _blank, (base,), self.__getstate__()

    Generated.__name__ = Generated.__qualname__ = f"ProxProp{base.__name__}"
    Generated.__module__ = __name__
    Generated.__doc__ = f"nn.{base.__name__} with proximal increments; see :func:`proxprop_layer`."
    return _LAYERS.setdefault(base, Generated)


_LAYERS: dict[type[nn.Module], type[ProxPropLayer]] = {}
proxprop_module_generator = proxprop_layer  # the original's name


def _blank(base: type[nn.Module]) -> ProxPropLayer:
    kind = proxprop_layer(base)
    return kind.__new__(kind)


def _one_of(name: str, value: Any, other: str, other_value: Any, default: Any) -> Any:
    if value is not None and other_value is not None:
        raise ValueError(f"expected {name} or {other}, which are the same, got both.")
    found = other_value if value is None else value
    return default if found is None else found


ProxPropLinear, ProxPropConv1d, ProxPropConv2d, ProxPropConv3d = map(proxprop_layer, _ROWS[:4])
ProxPropConvTranspose1d, ProxPropConvTranspose2d, ProxPropConvTranspose3d = map(proxprop_layer, _TRANSPOSED)


def ProxProp(  # noqa: N802
    layer: nn.Module,
    tau: float = DEFAULT_TAU,
    mode: str = DEFAULT_MODE,
    *,
    variant: Variant = "standard",
    statistics: Statistics = "global",
) -> ProxPropLayer:
    """A layer with the same parameters, hooks and options, whose gradients are proximal increments.

    Args:
        layer: any layer that :func:`proxprop_layer` takes.
        tau: step size of the proximal step.
        mode: "prox_exact", "prox_cgN" or "gradient".
        variant: see :class:`ProxPropLayer`.
        statistics: likewise.

    Raises:
        TypeError, ValueError: as :func:`proxprop_layer`.

    Example:
        >>> ProxProp(nn.Conv2d(3, 16, 5), tau=0.05, mode="prox_exact")
        ProxPropConv2d(3, 16, kernel_size=(5, 5), stride=(1, 1), tau=0.05, mode=prox_exact)
    """
    if isinstance(layer, ProxPropLayer):
        raise TypeError(f"expected a plain layer, got {type(layer).__name__}; wrap a layer once.")
    if isinstance(layer, OwnedLayer):
        raise TypeError(f"ProxProp: expected a plain layer, {taken(layer)}")
    wrapped = same_state(layer, proxprop_layer(type(layer)))
    wrapped._configure(tau, mode, variant, statistics)
    return wrapped


def checked_tau(tau: Any) -> float:
    """The step size.

    Raises:
        TypeError, ValueError: it is not a positive finite number.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f"expected tau to be a number, got {tau!r}.")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"expected tau > 0 and finite, got {tau}; the paper uses 0.05 and 1.")
    return float(tau)


def checked_mode(mode: Any) -> str:
    """The mode.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(mode, str) and re.fullmatch(r"gradient|prox_exact|prox_cg[1-9][0-9]*", mode):
        return mode
    raise ValueError(f"expected mode to be gradient, prox_exact or prox_cgN with N >= 1, got {mode!r}.")


def _wave(like: Tensor, phase: float) -> Tensor:
    """Numbers in [-1, 1] that no generator is asked for."""
    return torch.sin(torch.arange(like.numel(), device=like.device).double() * 0.7 + phase).view(like.shape).float()
