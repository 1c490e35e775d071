"""OIALR as a training method: weights become U Sigma V^h, and only Sigma goes on training (arXiv 2401.08505)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tract.methods.base import Measure, Method, Occasion, Predictor
from tract.oialr.bases import Factors, basis, decomposed, mixing_distance, stability, stable_rank, tall
from tract.oialr.checks import Checks
from tract.oialr.layers import (
    UNKNOWN,
    LowRankLayer,
    as_tall,
    counts,
    eligible_layers,
    factorised,
    low_rank_layers,
    to_low_rank,
    weight_name,
)
from tract.oialr.updates import (
    MOMENTS,
    Moments,
    apply_update,
    can_move,
    converted_moments,
    from_owners,
    moved,
    projected,
    updated,
)
from tract.owned import OwnedLayer
from tract.parameters import add_to, is_held, remove_from, replace_in

Freeze = Literal["conversion", "stability", "never"]
_FREEZES = ("conversion", "stability", "never")
_REFERENCE = "reference"
# The model's layer, and what makes an average's Sigma, (k, k), of the average's layer before.
_Carry = tuple[LowRankLayer, Callable[[nn.Module], Tensor]]


class OIALRMethod(Method):
    """Low rank found while training: bases are frozen, mixing matrices train, small singular values go.

    ``freeze="conversion"`` is what the authors' code runs: before step ``delay`` all layers get U and V of the SVD
    of their weight, frozen, and a full matrix Sigma, which trains; at each check Sigma is made diagonal by an SVD
    that turns the bases, and its small end is cut off (:func:`tract.oialr.bases.kept_rank`).

    ``freeze="stability"`` is what their paper tells: weights train in full until, from one check to the next, the
    Stability of a layer's basis reaches ``stability_threshold``; then this layer goes on as above.

    ``freeze="never"`` trains as ever and follows the bases of all layers.

    Moments of the optimizer follow the bases. Random numbers are not used. On several ranks, layer i is
    computed on rank i mod world.

    Args:
        freeze: "conversion", "stability" or "never".
        delay: steps before the first check, counted from 1; 0: low rank from the start.
        full_rank_warmup: False converts before the first step; checks begin at ``delay`` all the same.
        stability_frequency: steps from check to check.
        stability_threshold: of "stability", from -1 to 1.
        sigma_cutoff_fraction: share of the largest singular value below which the others go; 0 keeps all.
        keep_first_layer: stays as it is, of the eligible ones.
        keep_last_layer: likewise.
        network_layer_perc_step: see :class:`tract.oialr.checks.Checks`.
        stable_update_delay: likewise.
        inner_dim_init_ratio: share of the singular values that a conversion keeps, "conversion" only.
        fixed_inner_dim: no check after the conversion.
        reinit_shapes: False keeps shapes, and sets what is cut off to zero.
        moments: "rotated", or as the authors' code: "original".

    Raises:
        ValueError: a number out of range, no such word; (of ``apply``) no layer that a low rank pays for.
    """

    advice = ("lower sigma_cutoff_fraction", "raise delay")
    order = 1

    def __init__(
        self,
        freeze: Freeze,
        delay: int,
        full_rank_warmup: bool,
        stability_frequency: int,
        stability_threshold: float,
        sigma_cutoff_fraction: float,
        keep_first_layer: bool,
        keep_last_layer: bool,
        network_layer_perc_step: float,
        stable_update_delay: int,
        inner_dim_init_ratio: float,
        fixed_inner_dim: bool,
        reinit_shapes: bool,
        moments: Moments,
    ):
        for name, value, known in (("freeze", freeze, _FREEZES), ("moments", moments, MOMENTS)):
            if value not in known:
                raise ValueError(f"expected {name} to be {', '.join(known[:-1])} or {known[-1]}, got {value!r}.")
        if (
            not 0 <= sigma_cutoff_fraction < 1
            or not 0 < inner_dim_init_ratio <= 1
            or not -1 <= stability_threshold <= 1
        ):
            raise ValueError(
                "expected 0 <= sigma_cutoff_fraction < 1, 0 < inner_dim_init_ratio <= 1 and -1 <= stability_threshold "
                f"<= 1, got {sigma_cutoff_fraction}, {inner_dim_init_ratio} and {stability_threshold}."
            )
        self.freeze, self.moments, self.changes_shapes = freeze, moments, freeze != "never"
        self.checks = Checks(delay, stability_frequency, network_layer_perc_step, stable_update_delay)
        self.converts_at = max(1, delay) if full_rank_warmup else 1
        self.threshold, self.fraction = stability_threshold, sigma_cutoff_fraction
        self.keep_first, self.keep_last = keep_first_layer, keep_last_layer
        self.ratio, self.fixed, self.reshapes = inner_dim_init_ratio, fixed_inner_dim, reinit_shapes
        self._names: list[str] = []
        self._carries: dict[str, _Carry] = {}  # of the step that has just been taken

    # -- the model ----------------------------------------------------------------------

    def apply(self, model: nn.Module) -> str:
        """Choose the layers; convert them where there is no warm-up."""
        names = self._chosen(model)
        if not names:
            raise ValueError(
                f"expected a model with layers that a low rank pays for, got {type(model).__name__} with none; "
                f"{_cure(model)}."
            )
        if self.freeze != "conversion":
            for name in names:
                _track(model.get_submodule(name))
            self._check(model, None, 1)
            return f"OIALR ({self.freeze}) follows {len(names)} layers: {', '.join(names)}"
        if self.converts_at == 1:
            self._convert(model, names, None)
        self._check(model, None, 1)
        when = "now" if self.converts_at == 1 else f"before step {self.converts_at}"
        return f"OIALR on {len(names)} layers, converted {when}: {', '.join(names)}"

    def _chosen(self, model: nn.Module) -> list[str]:
        return eligible_layers(model, self.keep_first, self.keep_last)

    def claims(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """The layers' weights, or what they consist of."""
        for name in self._chosen(model):
            layer = model.get_submodule(name)
            yield from (layer.u, layer.s, layer.vh) if isinstance(layer, LowRankLayer) else (_weight(layer),)

    def match(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Give the layers the ranks they were saved with."""
        for name in self._chosen(model):
            layer, saved = model.get_submodule(name), weights.get(f"{name}.s")
            if saved is None:
                continue
            if isinstance(layer, LowRankLayer):
                shapes = {"u": (len(layer.u), len(saved)), "s": saved.shape, "vh": (len(saved), layer.vh.shape[1])}
                for own, shape in shapes.items():
                    old = layer._parameters[own]
                    layer._parameters[own] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
                layer.checked = layer.checked.new_zeros(len(saved))
                continue
            matrix = tall(_weight(layer))
            empty = matrix.detach().new_zeros
            size = len(saved)
            to_low_rank(model, name, Factors(empty(len(matrix), size), empty(size), empty(size, matrix.shape[1])))

    # -- training -----------------------------------------------------------------------

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Convert and check where it is time, before the next forward pass (number ``step + 2``)."""
        self._carries = {}
        if self.freeze == "conversion" and step + 2 == self.converts_at:
            self._convert(model, self._chosen(model), optimizer)
        self._check(model, optimizer, step + 2)

    def carry_average(self, before: nn.Module, after: nn.Module) -> None:
        """The model's bases, and Sigma in them: the best there is where the average has left them."""
        for name, (layer, sigma_of) in self._carries.items():
            twin = after.get_submodule(name)
            with torch.no_grad():
                twin.u.copy_(layer.u)
                twin.vh.copy_(layer.vh)
                twin.s.copy_(sigma_of(before.get_submodule(name)))

    def _check(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, forward_pass: int) -> None:
        if self.fixed or not self.checks.number(forward_pass):
            return
        names = self._chosen(model)
        due = self.checks.due(forward_pass, len(names))
        layers = [model.get_submodule(names[index]) for index in due]
        found = from_owners(due, lambda index: self._looked_at(model.get_submodule(names[index])), _device(model))
        for index, layer, result in zip(due, layers, found, strict=True):
            name = names[index]
            if not result:
                continue
            if isinstance(layer, LowRankLayer):
                converted_now = name in self._carries
                self._turn(name, layer, result, optimizer)
                if converted_now:  # R has not had a step to move in
                    layer.distance.fill_(UNKNOWN)
                continue
            (turned, apart), *factors = result
            if factors:
                self._become_low_rank(model, name, Factors(*factors), optimizer)
                layer = model.get_submodule(name)
            else:
                with torch.no_grad():
                    layer._parameters[_REFERENCE].copy_(_weight(layer))
            layer.stability.fill_(turned)
            layer.distance.fill_(apart)

    def _looked_at(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """What a check finds: an update; or Stability and distance, and with a basis that is stable its factors.

        Nothing of a layer whose numbers are not finite: the loop is going to say so.
        """
        if not (layer.s if isinstance(layer, LowRankLayer) else _weight(layer)).isfinite().all():
            return ()
        if isinstance(layer, LowRankLayer):
            return updated(layer, self.fraction)
        now, reference = as_tall(layer), tall(layer._parameters[_REFERENCE].detach()).double()
        if not reference.any():  # the first check of this layer
            return (now.new_full((2,), UNKNOWN),)
        factors, before = decomposed(now), decomposed(reference)
        turned = stability(basis(before.u, before.vh), basis(factors.u, factors.vh))
        numbers = torch.stack([turned, mixing_distance(reference, now)])
        if self.freeze == "never" or turned < self.threshold:
            return (numbers,)
        rank = stable_rank(factors.sigma, self.fraction, len(factors.sigma))
        return (numbers, factors.u[:, :rank], factors.sigma[:rank], factors.vh[:rank])

    def _turn(
        self, name: str, layer: LowRankLayer, update: tuple[Tensor, ...], optimizer: torch.optim.Optimizer | None
    ) -> None:
        old = {own: layer._parameters[own] for own in ("u", "s", "vh")}
        left, right = apply_update(layer, update, self.reshapes)
        if optimizer is not None:
            cuts = self.reshapes or self.moments == "rotated"
            move = moved(left, right, self.moments) if cuts else (lambda _, moment: moment)
            movable = can_move(optimizer.state.get(old["s"], {}), old["s"])
            replace_in(optimizer, old["s"], layer.s, move if movable else None)
            for frozen in ("u", "vh"):
                if is_held(optimizer, old[frozen]):
                    replace_in(optimizer, old[frozen], layer._parameters[frozen])
        _, earlier = self._carries.get(name, (layer, lambda average: average.s.double()))  # converted in this step
        self._carries[name] = layer, lambda average: left.mT @ earlier(average) @ right.mT

    def _convert(self, model: nn.Module, names: list[str], optimizer: torch.optim.Optimizer | None) -> None:
        """All layers at once, each with the first singular values of its weight."""

        def factors_of(index: int) -> Factors | tuple[()]:
            weight = _weight(model.get_submodule(names[index]))
            if not weight.isfinite().all():
                return ()
            return decomposed(weight, max(1, int(self.ratio * min(tall(weight).shape))))

        found = from_owners(range(len(names)), factors_of, _device(model))
        for name, factors in zip(names, found, strict=True):
            if not factors:
                continue
            self._become_low_rank(model, name, Factors(*factors), optimizer)

    def _become_low_rank(
        self, model: nn.Module, name: str, factors: Factors, optimizer: torch.optim.Optimizer | None
    ) -> None:
        plain = model.get_submodule(name)
        layer = to_low_rank(model, name, factors)
        if optimizer is not None:
            weight = _weight(plain)
            move = converted_moments(factors, tall, self.moments)
            replace_in(optimizer, weight, layer.s, move if can_move(optimizer.state.get(weight, {}), weight) else None)
            for frozen in (layer.u, layer.vh):
                add_to(optimizer, frozen, beside=layer.s)
            reference = plain._parameters.get(_REFERENCE)
            if reference is not None and is_held(optimizer, reference):
                remove_from(optimizer, reference)

        def carried(average: nn.Module) -> Tensor:
            return projected(factors.u, tall(_weight(average)), factors.vh, squares=False)

        self._carries[name] = layer, carried

    # -- what is said of it -------------------------------------------------------------

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Parameters in percent of the plain network's; rank, Stability and distance of R of every layer."""
        numbers = counts(model)
        for kind in ("trainable", "total", "inference"):
            yield f"oialr/{kind}_percent", 100 * numbers[kind] / numbers["dense"]
        yield "oialr/low_rank_layers", float(len(low_rank_layers(model)))
        for name in self._chosen(model):
            layer = model.get_submodule(name)
            low = isinstance(layer, LowRankLayer)
            full = min(len(layer.u), layer.vh.shape[1]) if low else min(tall(_weight(layer)).shape)
            yield f"oialr/rank/{name}", float(layer.rank if low else full)
            yield f"oialr/full_rank/{name}", float(full)
            if low or _REFERENCE in layer._parameters:
                for tag, value in (("stability", layer.stability), ("mixing_distance", layer.distance)):
                    if value != UNKNOWN:
                        yield f"oialr/{tag}/{name}", value.item()

    def evaluated(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Predictor]]:
        """The network for inference, with two plain layers for a low-rank one where that is smaller."""
        yield "test", factorised(model)

    def measured(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Measure]]:
        """Floating point operations for each image, of a training step and of inference with the factors."""
        known: dict[str, float] = {}

        def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if not known:
                known["flops_step"] = _operations(model, images, backward=True) / len(images)
                known["flops_inference"] = _operations(factorised(model), images, backward=False) / len(images)
            return {name: images.new_full((len(images),), value, dtype=torch.float64) for name, value in known.items()}

        yield "oialr", measure


def _operations(model: nn.Module, images: Tensor, backward: bool) -> int:
    """Floating point operations of matrix products and convolutions, a multiplication and an addition as two."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention in one piece is not counted
    try:
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            scores = model(images)
            if backward and trained:
                torch.autograd.grad(scores.sum(), trained, allow_unused=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def _track(layer: nn.Module) -> None:
    """Keep the weight of the last check beside a dense layer's, and what was found then."""
    weight = _weight(layer)
    layer.register_parameter(_REFERENCE, nn.Parameter(torch.zeros_like(weight), requires_grad=False))
    layer.register_buffer("stability", weight.detach().new_full((), UNKNOWN))
    layer.register_buffer("distance", weight.detach().new_full((), UNKNOWN))


def _weight(layer: nn.Module) -> nn.Parameter:
    return layer._parameters[weight_name(layer)]


def _cure(model: nn.Module) -> str:
    others = sorted({layer.method for layer in model.modules() if isinstance(layer, OwnedLayer)})
    if others:
        return f"layers made by {' and '.join(others)} stay as they are, so leave that out, or give it fewer layers"
    if not list(model.children()):
        return "put a lone layer into nn.Sequential"
    return "set keep_first_layer or keep_last_layer to false, or take another model"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
