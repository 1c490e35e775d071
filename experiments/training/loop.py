"""The training loop. It names no method, no model and no data set."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from experiments.config import GRAPH, Config, Precision
from experiments.data.batches import Batches
from experiments.randomness import seed_torch
from experiments.ranks import Ranks
from experiments.tasks.base import Batch, Task
from experiments.training.log import RunLog
from experiments.training.network import Network
from experiments.training.optim import (
    load_state_by_name,
    make_replayable,
    set_learning_rate,
    state_by_name,
    state_tensors,
)
from experiments.training.step_graph import step_graph
from experiments.training.stop import StoppedError, StopRequest, Wish
from runfolder import tags
from runfolder.errors import SupersededError, TrainingFailedError
from tract.methods.base import Measure, Method, Occasion

_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no bar
SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES = 300.0, 0.01  # at least so long, and at most so much of the time for saving


@dataclass
class Progress:
    """How far a run is: all of a trainer's state that is not in its tensors."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # optimizer steps done at the last evaluation
    seconds: float = 0.0  # training and evaluation time over all attempts
    epoch_seconds: float = 0.0  # the part of it in the current epoch
    train_seconds: float = 0.0  # all of it but the evaluations
    window: list[float] = field(default_factory=list)  # sums of loss and measures, and images, since the last point
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


class Trainer:
    """Trains one model to the end, or until told to stop.

    Args:
        config: the run.
        task: what it is trained for.
        model: the network after ``method.apply``, on its device.
        method: hooks.
        optimizer: made over ``method.param_groups``.
        factor: learning-rate factor of step s (from 0).
        batches: training and test data of this rank.
        log: the run's record.
        stop: reasons to stop early.
        ranks: who trains together.
        save: called on the first rank with :meth:`state` to write a checkpoint; what it raises
            is raised on all ranks.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        batches: Batches,
        log: RunLog,
        stop: StopRequest,
        ranks: Ranks,
        save: Callable[[int, dict[str, Any]], None],
    ):
        self.config, self.task, self.model, self.method = config, task, model, method
        self.optimizer, self.factor = optimizer, factor
        self.batches, self.log, self.stop, self.ranks, self._save = batches, log, stop, ranks, save
        self.device = batches.device
        self.progress = Progress(evaluated=-1 if config.eval_start else 0)
        self.total_steps = total_steps(config, batches.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision is Precision.fp16)
        self.network = Network(config, model, method, optimizer, ranks)
        self._window = torch.zeros(2 + len(self.task.measures), dtype=torch.float64, device=self.device)
        self._bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # the first bad one and all since
        self._bar = tqdm(disable=True)
        self._clock = self._last_save = self._last_said = self._speed_clock = time.monotonic()
        self._speed_images = self._speed_steps = 0
        self._save_took = 0.0
        self._graph = None
        if config.compile == GRAPH:
            self._graph = step_graph(config, task, method, optimizer, ranks, self.device)

    # -- state ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a later process needs to go on exactly here; call on all ranks."""
        self.progress.window = self.ranks.sum(self._window.clone()).tolist()
        if not self.ranks.first:
            self._window.zero_()  # the first rank holds the sum from here on
            return {}
        self._window.copy_(torch.tensor(self.progress.window, dtype=torch.float64))
        return {
            "progress": dict(vars(self.progress)),
            "model": self.model.state_dict(),
            "frozen": self._frozen(),
            "optimizer": state_by_name(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.network.average is None else self.network.average.state_dict(),
            "events": self.log.sizes(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state; call on all ranks, after ``method.match``."""
        if state["frozen"] != self._frozen():
            raise ValueError(
                f"expected the method's match to freeze what was frozen ({', '.join(state['frozen']) or 'nothing'}), "
                f"got {', '.join(self._frozen()) or 'nothing'}."
            )
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        load_state_by_name(self.optimizer, self.model, state["optimizer"])
        if self._graph is not None:
            make_replayable(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.network.average is not None:
            self.network.average.load_state_dict(state["ema"])
        if self.ranks.first:
            self._window.copy_(torch.tensor(self.progress.window, dtype=torch.float64))

    def _frozen(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]

    # -- running ----------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the end.

        Returns:
            The metrics of the last evaluation.

        Raises:
            StoppedError: asked to stop; a checkpoint was written.
            SupersededError: another process has taken the run; nothing was written.
            TrainingFailedError: the loss is not finite.
        """
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.ranks.first and self.config.runtime.progress else True,
        )
        self._clock = self._last_save = self._last_said = self._speed_clock = time.monotonic()
        _forget_peak(self.device)
        with self._bar:
            if self.ranks.highest(self.stop.wish()) >= Wish.STOP:
                raise StoppedError("told to stop before the first step")
            while True:
                if self._evaluation_is_due():
                    self._evaluate()
                if self.progress.step == self.total_steps:
                    break
                self._train_epoch()
        self._checkpoint()
        return self.progress.metrics

    def _train_epoch(self) -> None:
        progress, per_epoch = self.progress, self.batches.steps_per_epoch
        epoch, first = divmod(progress.step, per_epoch)
        last = min(per_epoch, self.total_steps - epoch * per_epoch)
        self.model.train()
        self._speed_clock, self._speed_images, self._speed_steps = time.monotonic(), 0, 0
        end = math.ceil(self.total_steps / per_epoch)
        for index, batch in zip(range(first, last), self.batches.train(epoch, first, end), strict=False):
            self.step(batch, self.batches.global_count(index))
            self.after_step(at_end=index == last - 1)

    def step(self, batch: Batch, global_count: int) -> None:
        """One optimizer step on this rank's share of a batch of so many images over all ranks."""
        step, config = self.progress.step, self.config
        shares = self.batches.shares(global_count)
        batch = self.task.prepared(batch, step, shares[self.ranks.rank].groups)
        seed_torch(config.seed, "step", step, self.ranks.rank)
        set_learning_rate(self.optimizer, self.factor(step))
        self.method.before_step(self.model, step)
        update = partial(self._update, global_count=global_count, sizes=[len(share.places) for share in shares])
        if self._graph is None:
            update(batch)
        else:
            self._graph(update, batch, whole=global_count == config.batch_size)
        self.network.after_step(step)
        self._speed_images += global_count
        self._speed_steps += 1

    def _update(self, batch: Batch, global_count: int, sizes: list[int]) -> None:
        """Gradients and the optimizer's step. Nothing in here may ask the device (but loss scaling does)."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(sizes)
        with self.method.accumulating(self.model) if parts > 1 else nullcontext():
            self._backward(batch, global_count, parts)
        self._bad_steps += self._window[0] - self._window[0] != 0
        self._add_penalty()
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            foreach = None if self._graph is None else False  # the kernel for all tensors copies a table from the host
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm, foreach=foreach)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _parts(self, sizes: list[int]) -> int:
        """Micro-batches of the ranks' shares of these sizes: equally many on every rank, none of them empty."""
        pieces = self.method.pieces
        needed = math.ceil(max(sizes) / (self.config.micro_batch or max(sizes)))
        return min(min(sizes), pieces * math.ceil(needed / pieces))

    def _backward(self, batch: Batch, global_count: int, parts: int) -> None:
        """Gradients of the mean loss over the global batch."""
        for number, part in enumerate(self.task.split(batch, parts)):
            self.method.before_part(self.model, self.progress.step, number, parts)
            together = number == parts - 1  # ranks exchange gradients in the last part only
            with nullcontext() if together or self.ranks.size == 1 else self.network.call.no_sync(), self._autocast():
                total, measures = self.task.loss(self._forward, part)
                loss = total * (self.ranks.size / global_count)
            self.scaler.scale(loss).backward()
            self._note(total.detach(), measures, len(part[0]))

    def _forward(self, images: Any, *others: Any) -> Any:
        return self.network.call(self._in_format(images), *others)

    def _add_penalty(self) -> None:
        """The penalty's own gradient, the same on every rank, added once to the finished gradients."""
        penalty = self.method.penalty(self.model)
        if penalty is None:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(self.scaler.scale(penalty), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _note(self, total: Tensor, measures: Tensor, images: int) -> None:
        self._window += torch.cat([total[None], measures, _number(images, total.device)])

    def after_step(self, at_end: bool) -> None:
        """What follows each step: count it, log (always ``at_end`` of an epoch), save, heed requests to stop."""
        progress, runtime = self.progress, self.config.runtime
        progress.step += 1
        self._bar.update()
        if at_end or progress.step % runtime.log_every == 0:
            self._log_window()
        is_due = bool(runtime.checkpoint_steps) and progress.step % runtime.checkpoint_steps == 0
        self._heed(is_due or time.monotonic() - self._last_save >= self._seconds_between_saves())

    def _seconds_between_saves(self) -> float:
        given = self.config.runtime.checkpoint_seconds
        return max(SECONDS_BETWEEN_SAVES, self._save_took / SHARE_OF_SAVES) if given is None else given

    def _heed(self, save_is_due: bool = False) -> None:
        """Do at a safe point what any rank is told to do; only the first rank's clock counts for saving."""
        wish = max(self.stop.wish(), Wish.SAVE if save_is_due and self.ranks.first else Wish.GO_ON)
        decision = self.ranks.highest(wish)
        if decision == Wish.ABANDON:
            raise SupersededError(self.stop.why or "another process has taken this run.")
        if decision != Wish.GO_ON:
            self._checkpoint()
        if decision == Wish.STOP:
            raise StoppedError(self.stop.why or "another rank was told to stop")

    def _log_window(self) -> None:
        self._require_finite()
        *sums, count = self.ranks.sum(self._window.clone()).tolist()
        self._window.zero_()
        step = self.progress.step
        means = {name: total / count for name, total in zip(("loss", *self.task.measures), sums, strict=True)}
        for name, value in means.items():
            self.log.scalar(f"train/{name}", value, step)
        self.log.scalar("train/lr", float(self.optimizer.param_groups[0]["lr"]), step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        figures = f"{shown}, {self.images_per_second():.0f} images/s"
        self._bar.set_postfix_str(figures)
        if self._bar.disable and time.monotonic() - self._last_said > _SECONDS_BETWEEN_LINES:
            self._last_said = time.monotonic()
            self.log.say(f"step {step}/{self.total_steps}: {figures}, {timedelta(seconds=self.seconds_left())} left")

    def seconds_left(self) -> int:
        """At the speed since this epoch began (or was entered)."""
        seconds_per_step = (time.monotonic() - self._speed_clock) / max(1, self._speed_steps)
        return round(seconds_per_step * (self.total_steps - self.progress.step))

    def images_per_second(self) -> float:
        """At the speed since this epoch began (or was entered)."""
        return self._speed_images / max(1e-9, time.monotonic() - self._speed_clock)

    def _require_finite(self) -> None:
        bad_steps = self.ranks.highest(int(self._bad_steps))
        if bad_steps:
            cures = ["lower optim.lr", "use precision=bf16 instead of fp16", *self.method.advice]
            raise TrainingFailedError(
                f"train/loss is not finite in step {self.progress.step - bad_steps + 1}; the last checkpoint is from "
                f"before. What may help: {', '.join(cures[:-1])} or {cures[-1]}."
            )

    def _require_finite_weights(self) -> None:
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all()
        if self.ranks.highest(int(not finite)):
            raise TrainingFailedError(
                f"the weights are not finite after step {self.progress.step}; the last checkpoint is from before. "
                "Lower optim.lr or clip gradients with clip_grad_norm=1."
            )

    def _checkpoint(self) -> None:
        self.ranks.agree(self.log.guard)
        self._require_finite()
        self._require_finite_weights()
        self._count_seconds()
        began = time.monotonic()
        state = self.state()
        self.ranks.agree(lambda: self._save(self.progress.step, state))
        self._last_save = time.monotonic()
        self._save_took = self._last_save - began
        self.stop.saved(self._save_took)

    def _count_seconds(self, training: bool = True) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self.progress.epoch_seconds += now - self._clock
        self.progress.train_seconds += (now - self._clock) * training
        self._clock = now

    # -- evaluation -------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        step, per_epoch = self.progress.step, self.batches.steps_per_epoch
        if step == self.progress.evaluated:
            return False
        return step == self.total_steps or step % (per_epoch * self.config.eval_every) == 0

    def _evaluate(self) -> None:
        speed = self.images_per_second() if self._speed_images else None
        peak = _peak_mib(self.device)
        self._count_seconds()
        metrics, facts = {}, {}
        # DistributedDataParallel brings buffers (BatchNorm's) in step in its next forward pass only.
        self.ranks.share(self.model.buffers())
        if self.network.average is not None:
            self.ranks.share(self.network.average.module.buffers())
        self.model.eval()
        for name, part, predictor in self._evaluated():  # stopped in between, the whole evaluation is repeated
            images = len(self.batches.evaluated[part])
            kept = [] if self.config.runtime.save_outputs and not metrics and self._occasion().last else None
            facts = facts or self._facts(predictor)
            predictor = self._in_use(predictor)
            batches, used = self.batches.test(part), predictor if kept is None else _keeping(predictor, kept)
            result = self.task.evaluate(used, batches, images, self.ranks, self._heed)
            if kept is not None:
                self._save_outputs(kept)
            metrics |= {f"{name}/{key}": value for key, value in result.items()}
        for name, measure in self.method.measured(self.model, self._occasion()):
            metrics |= {f"{name}/{key}": value for key, value in self._mean_over_test(measure).items()}
        metrics |= dict(self.method.metrics(self.model))
        self._count_seconds(training=False)
        self._record(metrics, facts | {tags.PEAK_MIB: peak}, speed)
        _forget_peak(self.device)

    def _facts(self, result: Callable[[Any], Any]) -> dict[str, float]:
        """Sizes of what is trained, and of the network that is the result."""
        parameters = list(self.model.parameters())
        used = list(result.parameters()) if isinstance(result, nn.Module) else parameters
        state = filter(torch.is_tensor, self.model.state_dict().values())
        kept = [*state, *state_tensors(self.optimizer)]
        return {
            tags.TRAINABLE: sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            tags.AT_INFERENCE: sum(parameter.numel() for parameter in used),
            tags.STATE_BYTES: sum(tensor.numel() * tensor.element_size() for tensor in kept),
        }

    def _evaluated(self) -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
        """(tag, part of the images, predictor): all on the test set, the first on what else is evaluated too."""
        others = [part for part in self.batches.evaluated if part != "test"]
        for number, (name, predictor) in enumerate(self.method.evaluated(self.model, self._occasion())):
            yield name, "test", predictor
            for part in () if number else others:
                yield part, part, predictor
        if self.network.average is not None:
            average = self.network.average.module.eval()
            for number, (name, predictor) in enumerate(self.method.evaluated(average, self._occasion())):
                yield f"ema/{name}" if number else "ema", "test", predictor

    def _occasion(self) -> Occasion:
        return Occasion(self._plain_images, self.ranks.sum, self.progress.step == self.total_steps)

    def _plain_images(self) -> Iterator[Tensor]:
        """Training images without augmentation in whole batches of this rank."""
        for images, _ in self.batches.plain():
            self._heed()
            if len(images):
                yield self._in_format(images)

    @torch.no_grad()
    def _mean_over_test(self, measure: Measure) -> dict[str, float]:
        """Means over the test images, of which ranks have shares."""
        sums: dict[str, Tensor] = {}
        for images, labels in self.batches.test():
            self._heed()
            with self._autocast():
                values = measure(self._in_format(images), labels)
            sums = {key: sums.get(key, 0.0) + value.double().sum() for key, value in values.items()}
        count = len(self.batches.evaluated["test"])
        return {key: float(self.ranks.sum(total[None])) / count for key, total in sums.items()}

    def _save_outputs(self, kept: list[Tensor]) -> None:
        """The class scores of all ranks in the order of the test images, and the labels."""
        numbers = self.batches.evaluated["test"]
        labels = [labels for _, labels in self.batches.test()]
        own = (torch.cat(kept).float().cpu().numpy(), torch.cat(labels).cpu().numpy())
        parts = self.ranks.gather(own)
        scores = np.empty((len(numbers), own[0].shape[1]), dtype=np.float32)
        targets = np.empty(len(numbers), dtype=np.int64)
        for rank, (some, classes) in enumerate(parts):
            scores[rank :: self.ranks.size], targets[rank :: self.ranks.size] = some, classes
        self.ranks.agree(lambda: self.log.outputs(scores, targets))

    def _in_use(self, predictor: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def predict(images: Any) -> Any:
            with self._autocast():
                return predictor(self._in_format(images))

        return predict

    def _record(self, metrics: dict[str, float], facts: dict[str, float], speed: float | None) -> None:
        progress = self.progress
        epoch = math.ceil(progress.step / self.batches.steps_per_epoch)
        times = {tags.EPOCH_SECONDS: progress.epoch_seconds, tags.TRAIN_SECONDS: progress.train_seconds}
        if speed is not None:
            times[tags.IMAGES_PER_SECOND] = speed
        for tag, value in (metrics | times | facts).items():
            self.log.scalar(tag, value, epoch)
        progress.evaluated, progress.epoch_seconds, progress.metrics = progress.step, 0.0, metrics
        figures = ", ".join(f"{tag} {value:.4g}" for tag, value in metrics.items())
        self.log.say(f"epoch {epoch}/{self.config.epochs}, step {progress.step}/{self.total_steps}: {figures}")

    # -- formats ----------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager:
        if self.config.precision is Precision.fp32:
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision is Precision.bf16 else torch.float16
        return torch.autocast(self.device.type, dtype)

    def _in_format(self, images: Any) -> Any:
        if self.config.channels_last and isinstance(images, Tensor):
            return images.contiguous(memory_format=torch.channels_last)
        return images


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _keeping(predictor: Callable[[Any], Any], kept: list[Tensor]) -> Callable[[Any], Any]:
    def predict(images: Any) -> Any:
        scores = predictor(images)
        kept.append(scores.detach())
        return scores

    return predict


@cache
def _number(value: int, device: torch.device) -> Tensor:
    return torch.full((1,), float(value), device=device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mib(device: torch.device) -> float:
    """The most memory of the device's tensors since it was forgotten; on the CPU, of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
