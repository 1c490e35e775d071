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
    - lth_lr (no warm-up): lr, a tenth from E / 2 on, a hundredth from 3 E / 4 on;
    - snapshot_cyc_lr: lr cos(p), p the fraction of a cycle of (E - w) / ``snapshots`` epochs;
    - swa_constant_lr: lr until E / 2, linear to s at 9 E / 10, then s;
    - cyc_lr: lr cos((e - w) / (S - w)) until S = ``swa_start`` E, then s cos(p), p the fraction of a cycle of
      ``cycle_epochs`` epochs;
    - swa_cyc_lr: as swa_constant_lr until S, then as cyc_lr.

    Rates are absolute.

    Raises:
        ValueError: no such policy.
    """

    policy: str
    lr: float
    warmup_epochs: int
    swa_lr: float
    swa_start: float
    cycle_epochs: float
    snapshots: int

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
        return _half_cosine((epoch - self.warmup_epochs) * self.snapshots / (epochs - self.warmup_epochs) % 1)

    def _swa_constant(self, epoch: int, epochs: float) -> float:
        done = min(max((epoch / epochs - 0.5) / 0.4, 0.0), 1.0)
        return 1 - (1 - self.swa_lr / self.lr) * done

    def _cycles(self, epoch: int, epochs: float) -> float:
        start = self._start(epochs)
        if epoch < start:
            return self._cosine(epoch, start)
        return self.swa_lr / self.lr * _half_cosine((epoch - start) / self.cycle_epochs % 1)

    def _swa_cycles(self, epoch: int, epochs: float) -> float:
        early = epoch < self._start(epochs)
        return self._swa_constant(epoch, epochs) if early else self._cycles(epoch, epochs)

    def _start(self, epochs: float) -> float:
        return round(self.swa_start * epochs, 6)  # a whole epoch even where the product is one but for rounding


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


_POLICIES = {
    "cosine_lr": SubspaceSchedule._cosine,
    "constant_lr": lambda self, epoch, epochs: 1.0,
    "linear": lambda self, epoch, epochs: 1 - epoch / epochs,
    "lth_lr": lambda self, epoch, epochs: 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs)),
    "snapshot_cyc_lr": SubspaceSchedule._snapshots,
    "swa_constant_lr": SubspaceSchedule._swa_constant,
    "cyc_lr": SubspaceSchedule._cycles,
    "swa_cyc_lr": SubspaceSchedule._swa_cycles,
}
