"""Lines, curves and simplexes of networks as training methods (arXiv 2102.10472)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from tract.layers import tract_layers
from tract.methods.base import Measure, Method, Occasion, Predictor, Setting
from tract.subspaces import evaluation
from tract.subspaces.layers import (
    apply_subspace,
    plain_at,
    set_coefficients,
    set_coefficients_layerwise,
    subspace_layers,
)
from tract.subspaces.norm import reestimated
from tract.subspaces.paths import Numbers, Simplex, path_of
from tract.subspaces.regulariser import absolute_cosine, squared_cosine, statistics

_REGULARISERS = {"squared": squared_cosine, "absolute": absolute_cosine}
# What random numbers are for: they are functions of the seed, this, and the place.
_POINT, _PAIR, _MEMBERS = range(3)


class SubspaceMethod(Method):
    """Every step trains the network at a random point of a subspace: W = sum_i c_i W_i.

    Algorithm 1 of Wortsman et al.: draw a point, take the loss of the network there, add
    beta cos^2(W_i, W_j) for a random pair of endpoints. What is evaluated is the midpoint; at
    the end of training a path of points too, and points together, as ensembles.

    Args:
        path: "line", "curve" or "simplex".
        endpoints: how many weights span it: 2, 3, or any number for a simplex.
        seed: of the draws; the run's.
        layerwise: every layer has a point of its own.
        num_samples: so many points in a step, each for its part of each rank's images.
        beta: weight of the regulariser; 0 does without.
        cosine: "squared", the original's, or "absolute"; see :mod:`tract.subspaces.regulariser`.
        shared_bias: linear layers and convolutions have one bias for all points.
        reestimate: evaluated points get batch-norm statistics of their own from the training images;
            else they have those of training, which mix the points.
        points: of a line or curve, equally far apart, that are evaluated at the end.
        members: random points of a simplex that are evaluated at the end, and together.

    Raises:
        ValueError: no such path or regulariser, or a number that is too small.
    """

    advice = ("lower method.beta",)

    def __init__(
        self,
        path: str,
        endpoints: int,
        seed: int,
        layerwise: bool,
        num_samples: int,
        beta: float,
        cosine: str,
        shared_bias: bool,
        reestimate: bool,
        points: int,
        members: int,
    ):
        self.path, self.seed, self.layerwise = path_of(path, endpoints), seed, layerwise
        for name, value, least in (("num_samples", num_samples, 1), ("points", points, 0), ("members", members, 0)):
            if value < least:
                raise ValueError(f"expected {name} to be at least {least}, got {value}.")
        if points == 1:
            raise ValueError("expected points to be 0 or at least 2, both ends among them, got 1.")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"expected beta to be 0 or more and finite, got {beta}.")
        if cosine not in _REGULARISERS:
            raise ValueError(f"expected cosine to be {' or '.join(_REGULARISERS)}, got {cosine!r}.")
        self.pieces, self.beta, self.regulariser = num_samples, beta, _REGULARISERS[cosine]
        self.shared_bias, self.reestimate, self.points, self.members = shared_bias, reestimate, points, members
        self._another: Callable[[], nn.Module] | None = None
        self._pair: tuple[int, int] | None = None
        # Of the evaluation that is going on: by the model (the network or its moving average) and the point.
        self._networks: dict[int, dict[tuple[float, ...], nn.Module]] = {}

    def prepare(self, setting: Setting) -> None:
        """Take the way to further networks."""
        self._another = setting.another

    def apply(self, model: nn.Module) -> str:
        """Give the layers their endpoints; the further ones are drawn as the network draws its own weights."""
        others = [self._another() for _ in range(self.path.endpoints - 1)]
        return " ".join(apply_subspace(model, self.path, others, self.shared_bias))

    def claims(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """The endpoints, but those that TrAct has too and claims."""
        shared = {p for layer in tract_layers(model) for p in layer.weights().values()}
        return (p for layer in subspace_layers(model) for p in layer.parameters() if p not in shared)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Draw the pair of endpoints for the regulariser."""
        if self.beta and self.path.endpoints > 1:
            self._pair = self.path.draw_pair(self._generator(_PAIR, step))

    def before_part(self, model: nn.Module, step: int, part: int, parts: int) -> None:
        """Go to the point of this micro-batch: alike on all ranks, and for all parts of one sample."""
        generator = self._generator(_POINT, step, part * self.pieces // parts)
        if not self.layerwise:
            set_coefficients(model, self.path.coefficients(*self.path.draw(generator)))
            return
        draws = [self.path.draw(generator) for _ in subspace_layers(model)]
        set_coefficients_layerwise(model, [self.path.coefficients(*draw) for draw in draws])

    def penalty(self, model: nn.Module) -> Tensor | None:
        """beta cos^2 of the pair."""
        if not self.beta or self.path.endpoints < 2:
            return None
        return self.beta * self.regulariser(model, *self._pair)

    def evaluated(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Predictor]]:
        """The midpoint; at the end the path and its pairs, or corners, random points and these together.

        The model itself is at the midpoint from here on, for other methods' networks.
        """
        set_coefficients(model, self.path.coefficients(*self.path.midpoint()))
        self._networks.pop(id(model), None)
        yield "test", self._at(model, occasion, self.path.midpoint())
        if not occasion.last:
            return
        for name, alpha in self._single():
            yield name, self._at(model, occasion, alpha)
        for name, alphas in self._together():
            yield name, mean_of([self._at(model, occasion, alpha) for alpha in alphas])

    def measured(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Measure]]:
        """How different the networks are that were evaluated together."""
        if occasion.last:
            for name, alphas in self._together():
                yield name, differences([self._at(model, occasion, alpha) for alpha in alphas])
        self._networks = {}

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """cos^2 and distance of the endpoints, over all pairs as the authors log them."""
        if self.path.endpoints > 1:
            cosine, apart = statistics(model)
            yield "subspace/squared_cosine", cosine.item()
            yield "subspace/distance", apart.item()

    def _single(self) -> list[tuple[str, tuple[float, ...]]]:
        """(tag, point) of what is evaluated alone at the end."""
        if not self._is_simplex:
            return [(f"path/{alpha:.3g}", (alpha,)) for alpha in self._alphas()]
        corners = [tuple(float(i == j) for i in range(1, self.path.endpoints)) for j in range(self.path.endpoints)]
        named = [(f"corner/{index}", corner) for index, corner in enumerate(corners)] if self.members else []
        return named + [(f"member/{index}", point) for index, point in enumerate(self._random_points())]

    def _together(self) -> list[tuple[str, list[tuple[float, ...]]]]:
        """(tag, points) of what is evaluated as an ensemble at the end."""
        if not self._is_simplex:
            return [(f"pair/{a:.3g}", [(a,), (1 - a,)]) for a in self._alphas() if a < 0.5]
        return [("ensemble", self._random_points())] if self.members > 1 else []

    @property
    def _is_simplex(self) -> bool:
        return isinstance(self.path, Simplex)

    def _alphas(self) -> list[float]:
        return [index / (self.points - 1) for index in range(self.points)]

    def _random_points(self) -> list[tuple[float, ...]]:
        generator = self._generator(_MEMBERS)
        return [self.path.draw(generator) for _ in range(self.members)]

    def _at(self, model: nn.Module, occasion: Occasion, alpha: tuple[float, ...]) -> nn.Module:
        key = tuple(round(number, 12) for number in alpha)
        networks = self._networks.setdefault(id(model), {})
        if key not in networks:
            networks[key] = plain_at(model, *alpha).requires_grad_(False)
            if self.reestimate:
                reestimated(networks[key], occasion.images(), occasion.share)
        return networks[key]

    def _generator(self, *place: int) -> Numbers:
        return Numbers(self.seed, *place)


def mean_of(networks: Sequence[Callable[[Tensor], Tensor]]) -> Predictor:
    """The networks as one: the mean of their logits, whose largest is that of their sum."""
    return lambda images: torch.stack([network(images).float() for network in networks]).mean(0)


def differences(networks: Sequence[nn.Module]) -> Measure:
    """How different networks are on a batch: means over all pairs, of features where a network names them."""

    def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits, features = zip(*(_logits_and_features(network, images) for network in networks), strict=True)
        found = {
            "total_variation": evaluation.total_variation(logits),
            "disagreement": evaluation.disagreement(logits),
            "disagreement_one_right": evaluation.disagreement_where_one_is_right(logits, labels),
        }
        if features[0] is not None:
            found["feature_squared_cosine"] = evaluation.feature_cosine(features, squared=True)
            found["feature_cosine"] = evaluation.feature_cosine(features, squared=False)
        return {name: torch.full((len(images),), value, device=images.device) for name, value in found.items()}

    return measure


def _logits_and_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    kept: list[Tensor] = []
    name = getattr(network, "features_layer", None)
    hook = network.get_submodule(name).register_forward_hook(lambda *_: kept.append(_[-1])) if name else None
    try:
        logits = network(images)
    finally:
        if hook is not None:
            hook.remove()
    return logits, kept[0] if kept else None
