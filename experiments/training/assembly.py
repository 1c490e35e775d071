"""The objects of a run, made as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from experiments.config import Config, Held, build, options_of
from experiments.data.base import Data
from experiments.data.batches import Batches
from experiments.models import build_model
from experiments.randomness import seed_torch
from experiments.ranks import Ranks
from experiments.tasks.base import Task
from experiments.tasks.classification import Classification
from experiments.training.log import RunLog
from experiments.training.loop import Trainer, total_steps
from experiments.training.optim import build_optimizer
from experiments.training.start import load_start
from experiments.training.stop import StopRequest
from runfolder.errors import UserError
from runfolder.failures import FailureKind
from tract.methods.base import Method, Setting


def load_data(config: Config, ranks: Ranks) -> Data:
    """The data set; the first rank downloads, the others read what it left.

    Raises:
        UserError: it is missing, damaged or not as expected.
    """
    options = config.data
    if config.runtime.data_copy is not None and "root" in options:
        options = options | {"root": config.runtime.data_copy}

    def load() -> Data:
        try:
            with _refusal_is_bad_input("data"):
                return build(options).load()
        except UserError as error:
            raise UserError(str(error), FailureKind.data) from error

    return ranks.first_then_all(load)


def build_trainer(
    config: Config,
    data: Data,
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest,
    log: RunLog,
    save: Callable[[int, dict[str, Any]], None],
    state: dict[str, Any] | None = None,
) -> Trainer:
    """The trainer of a run with its network, method, optimizer and batches.

    Args:
        config: the run.
        data: its data set.
        ranks: who trains together.
        device: where this rank computes.
        stop: reasons to stop early.
        log: the run's record.
        save: writes a checkpoint; see :class:`experiments.training.loop.Trainer`.
        state: the checkpoint that it continues from; without one it begins.

    Raises:
        UserError: a value that only the component itself can judge, or weights that do not fit.
    """
    batches = build_batches(config, data, ranks, device)
    tested = len(batches.evaluated["test"])
    if tested < len(data.test):
        log.say(f"evaluates on {tested:,} of {len(data.test):,} test images (eval_images)")
    task = data.task(config, len(data.classes))
    if config.runtime.save_outputs and not isinstance(task, Classification):
        raise UserError(f"expected runtime.save_outputs=false for {task.name}, which has no class scores of images.")
    model, method, applied = _network(config, task, data, batches, device)
    if state is not None:
        method.match(model, state["model"])
    else:
        load_start(config, model, log.say)
    if applied:
        log.say(applied)
    with _refusal_is_bad_input("optim"):
        optimizer = build_optimizer(config.optim, method, model, config.decay_matrices_only, config.bias_lr)
    factor = _factor(config, batches.steps_per_epoch)
    trainer = Trainer(config, task, model, method, optimizer, factor, batches, log, stop, ranks, save)
    if state is not None:
        trainer.load_state(state)
    return trainer


def build_batches(config: Config, data: Data, ranks: Ranks, device: torch.device) -> Batches:
    """What a rank of a run feeds to its network."""
    return Batches(
        data,
        seed=config.seed,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        repeats=config.repeats,
        mixed=config.mixup > 0 or config.cutmix > 0,
        mix_group=config.mix_group,
        overfit=config.overfit_batches,
        eval_batch_size=config.eval_batch_size,
        eval_images=config.eval_images,
        eval_train=config.eval_train,
        train_images=config.train_images,
        validation=config.validation_images,
        validation_last=config.validation_from is Held.last,
        workers=config.runtime.workers,
        ranks=ranks,
        device=device,
    )


def _network(
    config: Config, task: Task, data: Data, batches: Batches, device: torch.device
) -> tuple[nn.Module, Method, str | None]:
    """The model on its device with the method applied, the method, and what it says it did."""
    task.require_network()
    seed_torch(config.seed, "initialisation")

    def network() -> nn.Module:
        return build_model(config.model["name"], len(data.classes), **data.shape, **options_of(config.model))

    with _refusal_is_bad_input("model"):
        model = network()
    with _refusal_is_bad_input("method"):
        method = build(config.method)
        steps = total_steps(config, batches.steps_per_epoch)
        method.prepare(Setting(network, steps, batches.steps_per_epoch, batches.some))
        applied = method.apply(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format), method, applied


def _factor(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    with _refusal_is_bad_input("schedule"):
        schedule = build(config.schedule)
    steps = total_steps(config, steps_per_epoch)
    return lambda step: schedule.factor(step, steps_per_epoch, steps)


@contextmanager
def _refusal_is_bad_input(group: str) -> Iterator[None]:
    """Values that only the component itself can judge."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{group}: {error}") from error
