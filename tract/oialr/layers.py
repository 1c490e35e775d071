"""Layers whose weight is U Sigma V^h with frozen U and V (arXiv 2401.08505), and the way into and out of them.

The parameters are ``u`` (m, k), ``s`` (k, k) and ``vh`` (k, n) of the weight as :func:`tract.oialr.bases.tall`
has it; only ``s`` trains. Biases stay what they were, and so does every option of the layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tract.layers import WRAPPED, same_state
from tract.oialr.bases import Factors, decomposed, is_transposed, tall
from tract.owned import OwnedLayer
from tract.surgery import replace_module, require_state_dict

UNKNOWN = -2.0  # neither a Stability nor a distance; a number, since moving averages of buffers must stay finite
_FEW_OUTPUTS = 10  # a weight whose one side is that much shorter has nothing to gain


class LowRankLayer(OwnedLayer):
    """What all low-rank layers share; :func:`to_low_rank` makes them of plain ones.

    Attributes:
        dense_shape: of the weight.
        rank: how many singular values count; k, unless the shapes are kept (``reinit_shapes=False``).
        stability: of the basis at the last check; UNKNOWN before the first.
        distance: by how much the mixing matrix has moved since the check before; likewise.
        checked: the diagonal of Sigma after the last check, shape (k,).
    """

    method = "OIALR"
    dense_shape: torch.Size
    rank: Tensor
    stability: Tensor
    distance: Tensor
    checked: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, rest) and B (outputs, k) with W = B A, in the parameters' own precision."""
        with torch.autocast(self.s.device.type, enabled=False):
            if is_transposed(self.dense_shape):
                return (self.u @ self.s).mT, self.vh.mT
            return self.s @ self.vh, self.u

    def dense_weight(self) -> Tensor:
        """W, in the plain layer's shape."""
        a, b = self.factors()
        with torch.autocast(self.s.device.type, enabled=False):
            return (b @ a).reshape(self.dense_shape)

    def _saves(self, positions: int, groups: int = 1) -> bool:
        """Whether A and then B cost fewer multiplications than making W and using it, at so many places."""
        outputs, rest = self.dense_shape[0], self.dense_shape[1:].numel()
        rank = len(self.s)
        return positions * rank * (groups * rest + outputs) < outputs * rest * (positions + rank)

    def extra_repr(self) -> str:
        """The plain layer's options and the rank."""
        return ", ".join(filter(None, (super().extra_repr(), f"rank={int(self.rank)}")))


class LowRankLinear(LowRankLayer, nn.Linear):
    """nn.Linear with W = U Sigma V^h."""

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output, through the factors where that is less work."""
        if self._saves(math.prod(x.shape[:-1])):
            a, b = self.factors()
            return F.linear(F.linear(x, a), b, self.bias)
        return F.linear(x, self.dense_weight(), self.bias)


class _LowRankConv(LowRankLayer):
    @property
    def weight(self) -> Tensor:
        """W."""
        return self.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's output, through the factors where that is less work."""
        if not self._saves(self._positions(x), self.groups):
            return self._conv_forward(x, self.dense_weight(), self.bias)
        a, b = self.factors()
        spatial = len(self.kernel_size)
        a = a.reshape(len(self.s), *self.dense_shape[1:]).repeat(self.groups, *[1] * (spatial + 1))
        convolution = {1: F.conv1d, 2: F.conv2d}[spatial]
        b = b.reshape(*b.shape, *[1] * spatial)
        return convolution(self._conv_forward(x, a, None), b, self.bias, groups=self.groups)

    def _positions(self, x: Tensor) -> int:
        """An upper bound of the kernel's places: padding counts as if it reached every kernel's size."""
        batch = len(x) if x.ndim == len(self.kernel_size) + 2 else 1
        sizes = x.shape[-len(self.kernel_size) :]
        return batch * math.prod(-(-size // stride) for size, stride in zip(sizes, self.stride, strict=True))


class LowRankConv1d(_LowRankConv, nn.Conv1d):
    """nn.Conv1d with W = U Sigma V^h."""


class LowRankConv2d(_LowRankConv, nn.Conv2d):
    """nn.Conv2d with W = U Sigma V^h."""


class LowRankAttention(LowRankLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention whose joint input projection (3 E, E) is U Sigma V^h; the output projection is dense."""

    @property
    def in_proj_weight(self) -> Tensor:
        """W."""
        return self.dense_weight()


KINDS = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.MultiheadAttention: LowRankAttention,
}
_PLAIN = {kind: plain for plain, kind in KINDS.items()}
_OWN = ("u", "s", "vh")
_RECORDS = ("rank", "stability", "distance", "checked")


def weight_name(layer: nn.Module) -> str:
    """The parameter that becomes factors."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """All low-rank layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def eligible_layers(model: nn.Module, keep_first: bool, keep_last: bool) -> list[str]:
    """The layers that a low rank may pay for, in order of registration.

    Linear layers whose shorter side is more than a tenth of the longer one; Conv1d and Conv2d with
    in * kernel / groups >= outputs / 10; nn.MultiheadAttention with one width, for its input projection. Not
    layers of other classes (subclasses, lazy, parametrized ones), nor any whose weight is frozen or shared. A layer
    that another method has wrapped counts as the first or last one, and stays what it is.

    Args:
        model: plain, or wrapped by other methods.
        keep_first: leave out the first.
        keep_last: leave out the last.
    """
    inside = {id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    inside -= {id(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    named = {name: module for name, module in model.named_modules() if name and id(module) not in inside}
    found = [name for name, module in named.items() if _pays(module)]
    found = found[keep_first : len(found) - keep_last]
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        name
        for name in found
        if isinstance(named[name], LowRankLayer)
        or (type(named[name]) in KINDS and uses.get(_trained_weight_id(named[name])) == 1)
    ]


def _trained_weight_id(layer: nn.Module) -> int | None:
    weight = layer._parameters.get(weight_name(layer))
    return id(weight) if weight is not None and weight.requires_grad else None


def _pays(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    if isinstance(module, nn.MultiheadAttention):
        return module._qkv_same_embed_dim
    if isinstance(module, nn.Linear):
        sides = (module.in_features, module.out_features)
        return min(sides) > max(sides) / _FEW_OUTPUTS
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and isinstance(module, tuple(WRAPPED)):
        inputs = module.in_channels * math.prod(module.kernel_size) / module.groups
        return inputs >= module.out_channels / _FEW_OUTPUTS
    return False


def to_low_rank(model: nn.Module, name: str, factors: Factors) -> LowRankLayer:
    """Put a low-rank layer in a plain one's place: U and V^h frozen, Sigma a full trainable matrix.

    Args:
        model: contains the layer.
        name: the layer's.
        factors: of its weight.
    """
    layer = model.get_submodule(name)
    dense = layer._parameters[weight_name(layer)]
    low = same_state(layer, KINDS[type(layer)])
    low.dense_shape = dense.shape
    del low._parameters[weight_name(layer)]
    for record in _RECORDS:
        low._buffers.pop(record, None)
    low._parameters.pop("reference", None)
    sigma = torch.diag(factors.sigma)
    for own, value in zip(_OWN, (factors.u, sigma, factors.vh), strict=True):
        value = value.to(dense).contiguous()
        low.register_parameter(own, nn.Parameter(value, requires_grad=own == "s" and dense.requires_grad))
    for record in ("stability", "distance"):
        low.register_buffer(record, dense.new_full((), UNKNOWN))
    low.register_buffer("rank", torch.tensor(len(factors.sigma), device=dense.device))
    low.register_buffer("checked", factors.sigma.to(dense))
    replace_module(model, layer, low)
    return low


def dense_layer(layer: LowRankLayer) -> nn.Module:
    """A plain layer with W as its weight."""
    plain = same_state(layer, _PLAIN[type(layer)])
    del plain.dense_shape
    for own in _OWN:
        del plain._parameters[own]
    for record in _RECORDS:
        del plain._buffers[record]
    weight = nn.Parameter(layer.dense_weight().detach().clone(), requires_grad=layer.s.requires_grad)
    plain._parameters = {weight_name(plain): weight, **plain._parameters}
    return plain


class Factorised(nn.Sequential):
    """Two plain layers, A and then B, which for whoever reads ``weight`` and ``bias`` are one layer."""

    dense_shape: torch.Size

    @property
    def weight(self) -> Tensor:
        """W = B A, in the plain layer's shape."""
        first, second = self
        groups = getattr(first, "groups", 1)
        a = first.weight.flatten(1)[: len(first.weight) // groups]
        return (second.weight.flatten(1) @ a).reshape(self.dense_shape)

    @property
    def bias(self) -> Tensor | None:
        """B's."""
        return self[1].bias


def factorised_layer(layer: LowRankLayer) -> nn.Module:
    """Two plain layers, A and then B with the bias, where that is fewer numbers; else the dense layer.

    A layer with hooks is dense too, since they are for one layer.
    """
    outputs, rest, groups = layer.dense_shape[0], layer.dense_shape[1:].numel(), getattr(layer, "groups", 1)
    rank = int(layer.rank)
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooks or isinstance(layer, nn.MultiheadAttention) or rank * (groups * rest + outputs) >= outputs * rest:
        return dense_layer(layer)
    a, b = (factor.detach() for factor in layer.factors())
    if rank < len(layer.s):
        weight = Factors(*decomposed((b.double() @ a.double()), rank))
        full = (weight.u * weight.sigma, weight.vh)
        b, a = full if not is_transposed((outputs, rest)) else (weight.vh.mT, (weight.u * weight.sigma).mT)
    if isinstance(layer, nn.Linear):
        first = nn.Linear(rest, rank, bias=False, device="meta")  # which draws no random numbers
        second = nn.Linear(rank, outputs, bias=False, device="meta")
        a_kernel, b_kernel = a, b
    else:
        kind, spatial = type(dense_layer(layer)), len(layer.kernel_size)
        options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        first = kind(layer.in_channels, groups * rank, layer.kernel_size, bias=False, device="meta", **options)
        second = kind(groups * rank, outputs, 1, groups=groups, bias=False, device="meta")
        a_kernel = a.reshape(rank, *layer.dense_shape[1:]).repeat(groups, *[1] * (spatial + 1))
        b_kernel = b.reshape(*b.shape, *[1] * spatial)
    for target, value in ((first, a_kernel), (second, b_kernel)):
        target.weight = nn.Parameter(value.to(layer.s).contiguous().clone())
    if layer.bias is not None:
        second.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    pair = Factorised(first, second).train(layer.training)
    pair.dense_shape = layer.dense_shape
    return pair


def dense(model: nn.Module) -> nn.Module:
    """A copy of the model with plain layers: ``dense(model).state_dict()`` is the plain model's."""
    return _with(model, dense_layer)


def factorised(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: each low-rank layer as two plain ones where that is smaller."""
    return _with(model, factorised_layer)


def _with(model: nn.Module, made) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        forget_tracking(module)
    if isinstance(model, LowRankLayer):
        return made(model)
    for layer in low_rank_layers(model).values():
        replace_module(model, layer, made(layer))
    return model


def forget_tracking(module: nn.Module) -> None:
    """Take from a dense layer what is kept to follow its basis."""
    if not isinstance(module, LowRankLayer) and module._parameters.pop("reference", None) is not None:
        del module._buffers["stability"], module._buffers["distance"]


@torch.no_grad()
def load_dense(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Give a low-rank model the values of a plain model's state dict.

    Each low-rank layer keeps its rank: U, Sigma and V^h are those of the best approximation of that rank.

    Args:
        model: may have low-rank layers.
        state_dict: of a plain model of the same architecture.

    Raises:
        ValueError: keys or shapes that do not fit.
    """
    require_state_dict(state_dict, {name: value.shape for name, value in dense(model).state_dict().items()})
    own = model.state_dict()
    for name, layer in low_rank_layers(model).items():
        prefix = f"{name}." if name else ""
        factors = decomposed(state_dict[prefix + weight_name(layer)], int(layer.rank))
        for target in (layer.u, layer.s, layer.vh):
            target.zero_()
        k = len(factors.sigma)
        layer.u[:, :k].copy_(factors.u)
        layer.s[:k, :k].copy_(torch.diag(factors.sigma))
        layer.vh[:k].copy_(factors.vh)
        layer.checked.zero_()[:k].copy_(factors.sigma)
    for name, value in state_dict.items():
        if name in own:
            own[name].copy_(value)


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that the network consists of: without what is only kept to follow its bases."""
    return ((name, p) for name, p in model.named_parameters() if not _is_reference(model, name))


def _is_reference(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "reference" and "stability" in model.get_submodule(path)._buffers


def counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters.

    Returns:
        "dense" (of the plain model), "total" and "trainable" (as the model is), and "inference" (as
        :func:`factorised` makes it).
    """
    own = [parameter for _, parameter in parameters_of(model)]
    total = sum(parameter.numel() for parameter in own)
    plain = inference = total
    for layer in low_rank_layers(model).values():
        factors = layer.u.numel() + layer.s.numel() + layer.vh.numel()
        outputs, rest, groups = layer.dense_shape[0], layer.dense_shape[1:].numel(), getattr(layer, "groups", 1)
        split = int(layer.rank) * (groups * rest + outputs)
        plain += outputs * rest - factors
        smallest = outputs * rest if isinstance(layer, nn.MultiheadAttention) else min(split, outputs * rest)
        inference += smallest - factors
    trainable = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return {"dense": plain, "total": total, "trainable": trainable, "inference": inference}


def as_tall(layer: nn.Module) -> Tensor:
    """A dense layer's weight as (m, n), m >= n, float64."""
    return tall(layer._parameters[weight_name(layer)].detach()).double()
