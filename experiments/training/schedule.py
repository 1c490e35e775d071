"""Learning-rate schedules: pure functions of the optimizer step.

Each is a class with the recipe's numbers and one method, ``factor(step, steps_per_epoch,
total_steps)``: what the base learning rate is multiplied by in step ``step`` (from 0).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass


def warmup_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of a warm-up given in epochs; in step t of w the factor is t / w, so the very first is 0."""
    return round(epochs * steps_per_epoch)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 down to ``final`` at the very last step.

    factor(t) = final + (1 - final) (1 + cos(pi (t - w) / (T - w))) / 2 with w warm-up steps
    of T; during warm-up factor(t) = t / w.
    """

    warmup_epochs: float
    final: float

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate."""
        warmup = warmup_steps(self.warmup_epochs, steps_per_epoch)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class MultiStep:
    """Linear warm-up, then times ``gamma`` after each milestone (in finished epochs).

    With ``of_epochs`` the milestones are those of a run of so many epochs; in a shorter or
    longer one they come in proportion, at whole epochs.
    """

    milestones: list[float]
    gamma: float
    warmup_epochs: float
    of_epochs: float | None = None

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate."""
        warmup = warmup_steps(self.warmup_epochs, steps_per_epoch)
        if step < warmup:
            return step / warmup
        milestones = sorted(self.milestones)
        if self.of_epochs is not None:
            scale = total_steps / steps_per_epoch / self.of_epochs
            milestones = [round(milestone * scale) for milestone in milestones]
        return self.gamma ** bisect_right(milestones, step / steps_per_epoch)


@dataclass(frozen=True)
class EpochCosine:
    """timm's cosine per epoch, as the DeiT code steps it: after an epoch, with that epoch's number.

    In epoch e (from 0) the rate is f(max(0, e - 1)), so that epochs 0 and 1 have the same, with
    f(t) = s + t (lr - s) / w for t < w and m + (lr - m) (1 + cos(pi t / E)) / 2 after; s is
    ``warmup_lr``, w ``warmup_epochs``, m ``min_lr``, E the run's epochs. Rates are absolute.
    """

    lr: float
    warmup_epochs: float
    warmup_lr: float
    min_lr: float

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate, which must be ``lr``."""
        t = max(0, step // steps_per_epoch - 1)
        if t < self.warmup_epochs:
            return (self.warmup_lr + t * (self.lr - self.warmup_lr) / self.warmup_epochs) / self.lr
        epochs = total_steps / steps_per_epoch
        return (self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * t / epochs))) / self.lr


@dataclass(frozen=True)
class GradualCosine:
    """ViT-CIFAR's cosine per epoch: CosineAnnealingLR in ildoonet's GradualWarmupScheduler.

    In epoch e (from 0) the rate is lr e / w for e <= w, all of the first epoch's 0, and then
    m + (lr - m) (1 + cos(pi (e - w - 1) / E)) / 2; w is ``warmup_epochs``, m ``min_lr``, E the run's
    epochs. Epochs w and w + 1 have lr, and m is not reached. Rates are absolute.
    """

    lr: float
    warmup_epochs: int
    min_lr: float

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate, which must be ``lr``."""
        epoch, epochs = step // steps_per_epoch, total_steps / steps_per_epoch
        if epoch <= self.warmup_epochs:
            return epoch / self.warmup_epochs if self.warmup_epochs else 1.0
        progress = (epoch - self.warmup_epochs - 1) / epochs
        return (self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))) / self.lr


@dataclass(frozen=True)
class TimmCosine:
    """timm's cosine with warm-up, restarts and k-decay (arXiv 1608.03983, 2004.05909), as OIALR's trainer drives it.

    Time t counts steps from 0 (``on_updates``) or epochs, T is the first cycle's length, w the warm-up's, m ``min_lr``:

    - t < w: s + t (lr - s) / w, s being ``warmup_lr``;
    - then, with t - w for t if ``warmup_prefix``, cycle i has the length T c^i (c is ``cycle_mul``) and at u since its
      start the rate m + (lr d^i - m) (1 + cos(pi u^k / (T c^i)^k)) / 2; d is ``cycle_decay``, k ``k_decay``;
    - from cycle ``cycle_limit`` on: m.

    T is ``epochs``; where they and the warm-up are longer together than the run, OIALR's trainer takes the warm-up off
    them. With ``epochs=None`` T is what warm-up (if a prefix) and ``cooldown_epochs`` leave of the run; with ``epochs``
    given a cooldown changes nothing, as it only says when timm would stop. Rates are absolute.

    Raises:
        ValueError: an option out of its range, or no epochs left without the warm-up.
    """

    lr: float
    epochs: float | None
    warmup_epochs: float
    warmup_lr: float
    warmup_prefix: bool
    min_lr: float
    cycle_mul: float
    cycle_limit: int
    cycle_decay: float
    k_decay: float
    cooldown_epochs: float
    on_updates: bool

    def __post_init__(self):
        for key in ("cycle_mul", "k_decay", "cycle_limit"):
            if not getattr(self, key) > 0:
                raise ValueError(f"expected {key} above 0, got {getattr(self, key)}.")
        for key in ("warmup_lr", "min_lr", "cycle_decay", "cooldown_epochs"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"expected {key} of 0 or more, got {getattr(self, key)}.")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"expected epochs above 0 or null, got {self.epochs}.")

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate, which must be ``lr``."""
        unit = steps_per_epoch if self.on_updates else 1
        t = step if self.on_updates else step // steps_per_epoch
        warmup = self.warmup_epochs * unit
        if t < warmup:
            return (self.warmup_lr + t * (self.lr - self.warmup_lr) / warmup) / self.lr
        length = self.cycle_epochs(total_steps / steps_per_epoch) * unit
        return self._annealed(t - warmup if self.warmup_prefix else t, length) / self.lr

    def cycle_epochs(self, epochs: float) -> float:
        """Epochs of the first cycle in a run of so many."""
        if self.epochs is None:
            left = epochs - self.cooldown_epochs - self.warmup_epochs * self.warmup_prefix
        else:
            left = self.epochs - self.warmup_epochs * (self.epochs + self.warmup_epochs > epochs)
        if left <= 0:
            raise ValueError(
                f"expected epochs left for a cosine in a run of {epochs:g}, got {left:g} with "
                f"schedule.warmup_epochs={self.warmup_epochs:g}; give fewer, or more epochs."
            )
        return left

    def _annealed(self, t: float, length: float) -> float:
        if self.cycle_mul == 1:
            cycle = math.floor(t / length)
            since = t - cycle * length
        else:
            left = 1 - t / length * (1 - self.cycle_mul)  # cycle_mul^i at the start of cycle i
            if left <= 0:  # shrinking cycles, and all of them are over
                return self.min_lr
            cycle = math.floor(math.log(left, self.cycle_mul))
            since = t - (1 - self.cycle_mul**cycle) / (1 - self.cycle_mul) * length
        if cycle >= self.cycle_limit:
            return self.min_lr
        progress = max(since / (length * self.cycle_mul**cycle), 0.0) ** self.k_decay
        return self.min_lr + (self.lr * self.cycle_decay**cycle - self.min_lr) * _half_cosine(progress)


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then 1."""

    warmup_epochs: float

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate."""
        warmup = warmup_steps(self.warmup_epochs, steps_per_epoch)
        return step / warmup if step < warmup else 1.0


@dataclass(frozen=True)
class SubspaceSchedule:
    """The schedules of "Learning Neural Network Subspaces", per epoch.

    In epoch e (from 0) of E the rate is lr (e + 1) / w for e < w, w being ``warmup_epochs``, and then, with
    cos(p) for (1 + cos(pi p)) / 2 and s for ``swa_lr``:

    - cosine_lr: lr cos((e - w) / (E - w));
    - constant_lr: lr;
    - linear (no warm-up): lr (1 - e / E);
    - lth_lr (no warm-up): lr, a tenth from epoch 80 on, a hundredth from epoch 120 on;
    - swa_constant_lr: lr until E / 2, linear to s at 9 E / 10, then s;
    - snapshot_cyc_lr: from w on cycles of floor((E - w) / n) epochs, n being ``snapshots``, each a cosine from lr;
    - cyc_lr: lr cos((e - w) / (S - w)) until S = floor(``swa_start`` E), then two cycles of floor((E - S) / 2)
      epochs, each a cosine from s;
    - swa_cyc_lr: the same with n - 1 cycles.

    The last cycle ends with the run. With n = 1 the others are cosine_lr. ``of_epochs`` stands for E in S where it is
    given, as in the authors' code, which has 160 for runs of any length. Rates are absolute.

    Raises:
        ValueError: no such policy.
    """

    policy: str
    lr: float
    warmup_epochs: int
    swa_lr: float
    swa_start: float
    snapshots: int
    of_epochs: int | None

    def __post_init__(self):
        if self.policy not in _POLICIES:
            raise ValueError(f"expected a policy of {', '.join(_POLICIES)}, got {self.policy!r}.")

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Multiplier of the base learning rate, which must be ``lr``."""
        epoch, epochs = step // steps_per_epoch, total_steps / steps_per_epoch
        if epoch < self.warmup_epochs and self.policy not in ("linear", "lth_lr"):
            return (epoch + 1) / self.warmup_epochs
        return _POLICIES[self.policy](self, epoch, epochs)

    def _cosine(self, epoch: int, epochs: float) -> float:
        return _half_cosine((epoch - self.warmup_epochs) / (epochs - self.warmup_epochs))

    def _snapshots(self, epoch: int, epochs: float) -> float:
        bounds = _bounds(self.warmup_epochs, math.ceil(epochs), self.snapshots) if self.snapshots > 1 else []
        return self._in_cycle(epoch, bounds or [math.ceil(epochs)], 1.0)

    def _swa_constant(self, epoch: int, epochs: float) -> float:
        done = min(max((epoch / epochs - 0.5) / 0.4, 0.0), 1.0)
        return 1 - (1 - self.swa_lr / self.lr) * done

    def _swa_cycles(self, epoch: int, epochs: float) -> float:
        last, most = math.ceil(epochs), self.snapshots
        bounds = _bounds(self._start(last), last, most - 1, most) if most > 1 else [last]
        return self._in_cycle(epoch, bounds, self.swa_lr / self.lr)

    def _two_cycles(self, epoch: int, epochs: float) -> float:
        last = math.ceil(epochs)
        return self._in_cycle(epoch, _bounds(self._start(last), last, 2), self.swa_lr / self.lr)

    def _start(self, last: int) -> int:
        return int(self.swa_start * (self.of_epochs or last))

    def _in_cycle(self, epoch: int, bounds: list[int], base: float) -> float:
        """A cosine from the warm-up to the first bound, then one from ``base`` between two bounds each."""
        if epoch < bounds[0]:
            return self._cosine(epoch, bounds[0])
        begin = max(bound for bound in bounds if bound <= epoch)
        end = min(bound for bound in bounds if bound > epoch)
        return base * _half_cosine((epoch - begin) / (end - begin))


def _bounds(first: int, last: int, cycles: int, most: int | None = None) -> list[int]:
    """Where cycles of (last - first) / cycles whole epochs begin; the last bound is moved to the end."""
    length = max(1, (last - first) // cycles)
    bounds = list(range(first, last + 1, length))
    if most is not None and len(bounds) > most:
        bounds = list(range(first, last, length))
    return [*bounds[:-1], last]


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


_POLICIES = {
    "cosine_lr": SubspaceSchedule._cosine,
    "constant_lr": lambda self, epoch, epochs: 1.0,
    "linear": lambda self, epoch, epochs: 1 - epoch / epochs,
    "lth_lr": lambda self, epoch, epochs: 0.1 ** ((epoch >= 80) + (epoch >= 120)),
    "snapshot_cyc_lr": SubspaceSchedule._snapshots,
    "swa_constant_lr": SubspaceSchedule._swa_constant,
    "cyc_lr": SubspaceSchedule._two_cycles,
    "swa_cyc_lr": SubspaceSchedule._swa_cycles,
}
