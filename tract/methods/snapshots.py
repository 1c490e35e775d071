"""Averages of one training's weights: SWA, SWAG and their relatives, to compare subspaces with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tract.methods.base import Measure, Method, Occasion, Predictor, Setting
from tract.methods.subspace import differences, mean_of
from tract.subspaces.averaging import State, average, endpoint_weights, random_average, swag_sample
from tract.subspaces.norm import reestimated
from tract.subspaces.paths import Numbers

_ROWS, _TAKEN = "snapshots", "snapshots_taken"


class SnapshotMethod(Method):
    """Plain training that keeps snapshots of the weights, and averages them.

    At each evaluation with a snapshot: the mean of the snapshots (SWA, Izmailov et al., arXiv 1803.05407).
    At the end of training too: a sample of SWAG (Maddox et al., arXiv 1902.02476) and samples
    together, all snapshots as an ensemble, random weights of them (one for the network, for each
    layer, for each weight), weight t on one of them, and points of the line from the first to the
    last, alone and in pairs. All get batch-norm statistics of their own, from the training images.

    Snapshots are a frozen parameter of the model, so that a checkpoint holds them.

    Args:
        seed: of the draws; the run's.
        count: snapshots at the ends of so many equal parts of the training after ``start``; fewer where there are
            fewer steps.
        start: share of the steps before the first part.
        epochs: the ends of these epochs (from 1) instead.
        samples: of SWAG.
        t: weight on a snapshot.
        points: of the line.

    Raises:
        ValueError: a number out of range; (of ``prepare``) epochs that the run does not have.
    """

    order = 2
    keeps_shapes = True

    def __init__(
        self, seed: int, count: int, start: float, epochs: Sequence[int] | None, samples: int, t: float, points: int
    ):
        if count < 1 or not 0 <= start < 1 or samples < 0 or not 0 <= t <= 1 or points < 0 or points == 1:
            raise ValueError(
                "expected count of 1 or more, 0 <= start < 1, samples of 0 or more, 0 <= t <= 1, and points of 0 or 2 "
                f"and more, got count={count}, start={start}, samples={samples}, t={t}, points={points}."
            )
        self.seed, self.count, self.start, self.epochs = seed, count, start, epochs
        self.samples, self.t, self.points = samples, t, points
        self._at: list[int] = []  # steps after which a snapshot is taken
        self._together: dict[int, dict[str, list[nn.Module]]] = {}  # networks by tag, of each model that is evaluated

    def prepare(self, setting: Setting) -> None:
        """Find the steps of the snapshots."""
        if not setting.steps:  # an evaluation of what an earlier run has left
            self._at = list(range(self.count if self.epochs is None else len(self.epochs)))
            return
        if self.epochs is None:
            first, rest = self.start * setting.steps, (1 - self.start) * setting.steps
            ends = sorted({max(1, round(first + rest * (k + 1) / self.count)) for k in range(self.count)})
        else:
            ends = [epoch * setting.steps_per_epoch for epoch in self.epochs]
        if not ends or ends != sorted(set(ends)) or not 1 <= ends[0] <= ends[-1] <= setting.steps:
            raise ValueError(
                f"expected snapshots after different steps from 1 to {setting.steps}, in order, got {ends}; name other "
                "epochs."
            )
        self._at = ends

    def apply(self, model: nn.Module) -> str:
        """Make room for the snapshots."""
        size = sum(parameter.numel() for parameter in model.parameters())
        like = next(model.parameters())
        rows = nn.Parameter(torch.zeros(len(self._at), size, dtype=like.dtype), requires_grad=False)
        model.register_parameter(_ROWS, rows)
        model.register_buffer(_TAKEN, torch.zeros((), dtype=torch.int64))
        return f"{len(self._at)} snapshots of {size:,} weights, after steps {', '.join(map(str, self._at))}"

    def before_step(self, model: nn.Module, step: int) -> None:
        """Forget the snapshots of a run that this one starts from."""
        if step == 0:
            model.get_buffer(_TAKEN).zero_()

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take a snapshot where one is due."""
        if step + 1 in self._at:
            row = self._at.index(step + 1)
            model.get_parameter(_ROWS)[row] = parameters_to_vector(_weights(model))
            model.get_buffer(_TAKEN).fill_(row + 1)

    @torch.no_grad()
    def after_average(self, model: nn.Module, average: nn.Module) -> None:
        """The average's snapshots are the model's."""
        average.get_parameter(_ROWS).copy_(model.get_parameter(_ROWS))

    def evaluated(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Predictor]]:
        """The network as it is; the snapshots' mean; at the end what else can be made of them."""
        plain, states = _plain_and_snapshots(model)
        yield "test", plain
        if not states:
            return

        def made(state: State) -> nn.Module:
            return _made(plain, state, occasion)

        yield "swa", made(average(states))
        if not occasion.last:
            return
        count = len(states)
        together = self._together[id(model)] = {"snapshots": [made(state) for state in states]}
        yield "snapshots", mean_of(together["snapshots"])
        if count < 2:
            return
        generator = torch.Generator().manual_seed(self.seed)
        swag = [made(swag_sample(states, generator)) for _ in range(self.samples)]
        for index, network in enumerate(swag):
            yield f"swag/{index}", network
        if len(swag) > 1:
            yield "swag", mean_of(swag)
        for level in ("global", "layer", "weight"):
            yield f"random/{level}", made(random_average(states, Numbers(self.seed, count), level))
        for index in range(count):
            yield f"weighted/{index}", made(average(states, endpoint_weights(self.t, index, count)))
        alphas = [index / (self.points - 1) for index in range(self.points)]
        path = [made(average([states[0], states[-1]], [1 - alpha, alpha])) for alpha in alphas]
        for alpha, network in zip(alphas, path, strict=True):
            yield f"path/{alpha:.3g}", network
        for alpha, first, second in zip(alphas, path, reversed(path), strict=True):
            if alpha < 0.5:
                together[f"pair/{alpha:.3g}"] = [first, second]
                yield f"pair/{alpha:.3g}", mean_of([first, second])

    def measured(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Measure]]:
        """How different the networks are that were evaluated together."""
        for name, networks in self._together.get(id(model), {}).items():
            if len(networks) > 1:
                yield name, differences(networks)
        self._together = {}


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name != _ROWS]


def _plain_and_snapshots(model: nn.Module) -> tuple[nn.Module, list[State]]:
    """A copy of the network without the room for snapshots, and a state dict for each snapshot."""
    rows, taken = model.get_parameter(_ROWS).detach(), int(model.get_buffer(_TAKEN))
    plain = copy.deepcopy(model, {id(model.get_parameter(_ROWS)): None})
    del plain._parameters[_ROWS], plain._buffers[_TAKEN]
    twin, states = copy.deepcopy(plain), []
    for row in rows[:taken]:
        vector_to_parameters(row, twin.parameters())
        states.append({name: tensor.clone() for name, tensor in twin.state_dict().items()})
    return plain.requires_grad_(False), states


def _made(plain: nn.Module, state: State, occasion: Occasion) -> nn.Module:
    network = copy.deepcopy(plain)
    network.load_state_dict(state)
    return reestimated(network, occasion.images(), occasion.share)
