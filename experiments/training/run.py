"""One run: a configuration in, a trained folder out."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from experiments.config import Config, config_hash, folder_of, to_tree
from experiments.data.batches import fingerprint
from experiments.ranks import Ranks, choose_device, joined_ranks
from experiments.training import checkpoint
from experiments.training.assembly import build_trainer, load_data
from experiments.training.diagnosis import failure_recorded
from experiments.training.held import HeldFolder
from experiments.training.log import RunLog, lost_events
from experiments.training.loop import Trainer
from experiments.training.provenance import check_data, record_attempt
from experiments.training.stop import StopRequest, listening
from experiments.training.torch_settings import profiled, torch_settings
from runfolder.errors import UserError
from runfolder.failures import DISK_ERRORS, FailureKind
from runfolder.files import remove_leftovers, write_json
from runfolder.folder import RunFolder, typed
from runfolder.place import node_name
from runfolder.records import Progress, Result, read_result


def run(config: Config) -> Result:
    """Train (or continue, or merely report) one run.

    Args:
        config: the run; its folder follows from it.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: data, device, folder or disk are not as expected.
        RunBusyError: another process trains this run.
        StoppedError: asked to stop; the same call continues.
        TrainingFailedError: no use to go on; ``failure.json`` says why.
    """
    stop = StopRequest(_seconds_to_deadline(config), on_term=config.runtime.on_term)
    folder = folder_of(config)
    finished = read_result(folder)
    if finished is not None:
        return finished
    with listening(stop), ExitStack() as joined, HeldFolder(config, stop.abandon) as held, failure_recorded(held):
        device = choose_device(config.runtime.device)
        ranks = joined.enter_context(joined_ranks(device, folder.submissions))
        finished = held.take(ranks)
        if finished is not None:
            return finished
        with torch_settings(config), _disk_named(folder, held):
            return _train(config, held, device, ranks, stop)


def _seconds_to_deadline(config: Config) -> float | None:
    runtime = config.runtime
    ends = [] if runtime.deadline_minutes is None else [60 * runtime.deadline_minutes]
    if runtime.deadline_at is not None:
        ends.append(runtime.deadline_at - time.time())
    return min(ends, default=None)


def _train(config: Config, held: HeldFolder, device: torch.device, ranks: Ranks, stop: StopRequest) -> Result:
    folder, own = held.folder, held.folder if ranks.first else None  # the first rank writes
    data = load_data(config, ranks)
    log = RunLog(own, held.check)
    try:
        start, state = _checkpoint_to_continue(config, folder, ranks, log.say)
        if state is not None:
            ranks.agree(lambda: check_data(folder, fingerprint(data), _place_of_data(config)))
        save = _saver(config, held, start)
        trainer = build_trainer(config, data, ranks, device, stop, log, save, state)
        try:
            log.begin(state["events"] if state else {}, to_tree(config), trainer.task.primary_metric)
            held.tell_progress = lambda: report_progress(folder, trainer)
            step, steps = trainer.progress.step, trainer.total_steps
            attempts = record_attempt(folder, device, ranks.size, step, fingerprint(data)) if ranks.first else 0
            log.say(f"{folder.name}: {'continues at' if state else 'starts at'} step {step} of {steps}")
            with profiled(own if config.runtime.profile else None):
                trainer.run()
            log.say(f"finished after {trainer.progress.seconds:.0f} s")
        finally:
            trainer.batches.close()
            if ranks.first:
                with suppress(OSError):
                    report_progress(folder, trainer)
    finally:
        log.close()
    result = _result(config, trainer, attempts)
    ranks.agree(lambda: held.write_result(result))
    return result


def _checkpoint_to_continue(
    config: Config, folder: RunFolder, ranks: Ranks, say: Callable[[str], None]
) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest good checkpoint and its content; the first rank chooses, so that all read the same file."""

    def choose() -> Path | None:
        remove_leftovers(folder.path)
        return checkpoint.newest_good(
            folder.checkpoints, config_hash(config), say, lambda state: lost_events(folder, state["events"])
        )

    start = ranks.agree(choose)
    return start, None if start is None else checkpoint.load(start, config_hash(config))


def _place_of_data(config: Config) -> str:
    root = config.data.get("root")
    return f"data={config.data['name']}" if root is None else f"data.root={typed(root).absolute()}"


def _saver(config: Config, held: HeldFolder, start: Path | None) -> Callable[[int, dict[str, Any]], None]:
    keep = config.runtime.keep_checkpoints
    keeper = checkpoint.Keeper(held.folder.checkpoints, config_hash(config), keep, start)

    def save(step: int, content: dict[str, Any]) -> None:
        held.check()
        keeper.save(step, content)

    return save


def report_progress(folder: RunFolder, trainer: Trainer) -> None:
    """``progress.json``: how far the run is, for whoever watches it."""
    progress, per_epoch, metric = trainer.progress, trainer.batches.steps_per_epoch, trainer.task.primary_metric
    content: Progress = {
        "step": progress.step,
        "steps": trainer.total_steps,
        "epoch": round(progress.step / per_epoch, 2),
        "epochs": round(trainer.total_steps / per_epoch, 2),
        "primary_metric": metric,
        "value": progress.metrics.get(metric),
        "images_per_second": round(trainer.images_per_second(), 1),
        "seconds_left": trainer.seconds_left(),
        "host": node_name(),
    }
    write_json(folder.progress, content, durable=False)


def _result(config: Config, trainer: Trainer, attempts: int) -> Result:
    return {
        "config_hash": config_hash(config),
        "epochs": config.epochs,
        "steps": trainer.total_steps,
        "primary_metric": trainer.task.primary_metric,
        "metrics": trainer.progress.metrics,
        "weights_sha256": checkpoint.weights_digest(trainer.model),
        "attempts": attempts,
        "seconds": round(trainer.progress.seconds, 3),
        "train_seconds": round(trainer.progress.train_seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextmanager
def _disk_named(folder: RunFolder, held: HeldFolder) -> Iterator[None]:
    """A full or failing disk in one sentence; earlier checkpoints are untouched."""
    try:
        yield
    except OSError as error:
        held.check()  # a newer process may have removed the file that this one was writing
        if error.errno not in (*DISK_ERRORS, errno.EIO, errno.ESTALE):
            raise
        raise UserError(
            f"expected to write into {folder}, got: {error.strerror}; mend that, and the same command continues "
            "from the last checkpoint.",
            FailureKind.node if error.errno in (errno.EIO, errno.ESTALE) else FailureKind.disk,
        ) from error
