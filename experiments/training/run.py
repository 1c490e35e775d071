"""One run: a configuration and its folder in, objects made, a trained folder out."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.nn as nn

from experiments.config import Config, build, config_hash, options_of, to_tree
from experiments.errors import RunBusyError, TrainingFailedError, UserError
from experiments.models import build_model
from experiments.training import checkpoint
from experiments.training.data import Batches, Data, fingerprint
from experiments.training.diagnosis import record_error
from experiments.training.files import remove_leftovers, write_json
from experiments.training.folder import folder_of, prepare_folder, result_of
from experiments.training.lease import Heartbeat, Lease, SupersededError, is_held, take
from experiments.training.log import RunLog, lost_events
from experiments.training.loop import StoppedError, Trainer, total_steps
from experiments.training.optim import build_optimizer
from experiments.training.parallel import Ranks, choose_device, joined_ranks
from experiments.training.place import node_name, place_of_this_rank
from experiments.training.provenance import record_attempt
from experiments.training.randomness import seed_torch
from experiments.training.start import load_start
from experiments.training.state import newest
from experiments.training.stop import StopRequest, listening
from experiments.training.task import Task
from experiments.training.tasks import task_of
from tract import NonFiniteError
from tract.methods.base import Method


def run(config: Config) -> dict:
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
    runtime = config.runtime
    stop = StopRequest(_seconds_to_deadline(config), on_term=runtime.on_term)
    folder = folder_of(config)
    finished = result_of(folder)
    if finished is not None:
        return finished
    with listening(stop), ExitStack() as held, _failure_recorded(folder) as ours:
        device = choose_device(runtime.device)
        ranks = held.enter_context(joined_ranks(device, folder.parent / "slurm"))
        desk = _Desk(config, folder, held, stop)
        finished = ranks.agree(desk.open)
        ours.append(desk)
        if finished is not None:
            return finished
        with torch_settings(config), _disk_named(folder):
            return _train(config, folder, device, ranks, stop, desk)


def _seconds_to_deadline(config: Config) -> float | None:
    runtime = config.runtime
    ends = [] if runtime.deadline_minutes is None else [60 * runtime.deadline_minutes]
    if runtime.deadline_at is not None:
        ends.append(runtime.deadline_at - time.time())
    return min(ends, default=None)


class _Desk:
    """What the first rank does for all: it takes the run's folder, keeps it, and reports from it."""

    def __init__(self, config: Config, folder: Path, held: ExitStack, stop: StopRequest):
        self._config, self._folder, self._held, self._stop = config, folder, held, stop
        self.lease: Lease | None = None
        self.trainer: Trainer | None = None

    def open(self) -> dict | None:
        """Take the folder until ``held`` is closed; the result if another process has finished the run meanwhile."""
        folder, runtime = self._folder, self._config.runtime
        new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.", "disk") from None
        self._held.enter_context(_removed_if_unusable(folder, new))
        self.lease = take(folder, runtime.heartbeat_seconds, runtime.patience_seconds)
        self._held.callback(self.lease.release)
        self._held.enter_context(Heartbeat(self.lease, runtime.heartbeat_seconds, self.report, self._stop.abandon))
        finished = result_of(folder)
        if finished is None:
            (folder / "failure.json").unlink(missing_ok=True)
            prepare_folder(self._config)
        return finished

    def is_ours(self) -> bool:
        """Whether no newer process has taken the run; other ranks than the first cannot tell."""
        try:
            if self.lease is not None:
                self.lease.check()
        except SupersededError:
            return False
        except OSError:
            pass
        return True

    def write(self, name: str, content: dict) -> None:
        """Write a JSON file into the folder, if the run is still ours."""
        self.lease.check()
        write_json(self._folder / name, content)

    def report(self) -> None:
        """``progress.json``: how far the run is, for whoever watches it."""
        trainer = self.trainer
        if trainer is None:
            return
        progress, per_epoch = trainer.progress, trainer.batches.steps_per_epoch
        content = {
            "step": progress.step,
            "steps": trainer.total_steps,
            "epoch": round(progress.step / per_epoch, 2),
            "epochs": round(trainer.total_steps / per_epoch, 2),
            "headline": trainer.task.headline,
            "score": progress.metrics.get(trainer.task.headline),
            "images_per_second": round(trainer.images_per_second(), 1),
            "seconds_left": trainer.seconds_left(),
            "host": node_name(),
        }
        write_json(self._folder / "progress.json", content, durable=False)


def _train(config: Config, folder: Path, device: torch.device, ranks: Ranks, stop: StopRequest, desk: _Desk) -> dict:
    data = _load_data(config, ranks)
    task = task_of(config, data)
    batches = Batches(
        data,
        seed=config.seed,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        repeats=config.repeats,
        overfit=config.overfit_batches,
        eval_batch_size=config.eval_batch_size,
        workers=config.runtime.workers,
        ranks=ranks,
        device=device,
    )
    model, method, applied = _network(config, task, data, device)
    notes: list[str] = []
    start = _choose_checkpoint(config, folder, ranks, notes.append)
    state = None if start is None else checkpoint.load(start, config_hash(config))
    if state is not None:
        method.match(model, state["model"])
    else:
        load_start(config, model, notes.append)
    with _refusal_is_bad_input("optim"):
        optimizer = build_optimizer(config.optim, method, model, config.decay_matrices_only)
    log = RunLog(
        folder if ranks.first else None,
        state["events"] if state else {},
        _flat(to_tree(config)),
        task.headline,
        guard=desk.lease.check if ranks.first else None,
    )
    try:
        factor, save = _factor(config, batches.steps_per_epoch), _saver(config, folder, start, desk)
        trainer = Trainer(config, task, model, method, optimizer, factor, batches, log, stop, ranks, save)
        if state is not None:
            trainer.load_state(state)
        desk.trainer = trainer
        for note in filter(None, [*notes, applied]):
            log.say(note)
        step, steps = trainer.progress.step, trainer.total_steps
        attempts = record_attempt(folder, device, ranks.size, step, fingerprint(data)) if ranks.first else 0
        log.say(f"{folder.name}: {'continues at' if state else 'starts at'} step {step} of {steps}")
        with _profiled(config, folder if ranks.first else None):
            trainer.run()
        log.say(f"finished after {trainer.progress.seconds:.0f} s")
    finally:
        log.close()
        batches.close()
        if ranks.first:
            with suppress(OSError):
                desk.report()
    result = _result(config, trainer, attempts)
    ranks.agree(lambda: desk.write("result.json", result))
    return result


def _load_data(config: Config, ranks: Ranks) -> Data:
    """The first rank downloads; the others read what it left."""
    loaded: list[Data] = []
    options = config.data
    if config.runtime.data_copy is not None and "root" in options:
        options = options | {"root": config.runtime.data_copy}

    def load() -> None:
        try:
            with _refusal_is_bad_input("data"):
                loaded.append(build(options))
        except UserError as error:
            raise UserError(str(error), "data") from error

    ranks.agree(load)
    if not ranks.first:
        load()
    return loaded[0]


def _network(config: Config, task: Task, data: Data, device: torch.device) -> tuple[nn.Module, Method, str | None]:
    """The model on its device with the method applied, the method, and what it says it did."""
    task.require_network(config)
    seed_torch(config.seed, "initialisation")
    with _refusal_is_bad_input("model"):
        model = build_model(config.model["name"], len(data.classes), **data.shape, **options_of(config.model))
    with _refusal_is_bad_input("method"):
        method = build(config.method)
        applied = method.apply(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format), method, applied


def _choose_checkpoint(config: Config, folder: Path, ranks: Ranks, report: Callable[[str], None]) -> Path | None:
    """The newest good checkpoint; the first rank chooses, so that all read the same file."""

    def choose() -> Path | None:
        remove_leftovers(folder)
        return checkpoint.newest_good(
            folder / "checkpoints", config_hash(config), report, lambda state: lost_events(folder, state["events"])
        )

    return ranks.agree(choose)


def _factor(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    with _refusal_is_bad_input("schedule"):
        schedule = build(config.schedule)
    steps = total_steps(config, steps_per_epoch)
    return lambda step: schedule.factor(step, steps_per_epoch, steps)


def _saver(config: Config, folder: Path, start: Path | None, desk: _Desk) -> Callable[[int, dict], None]:
    keeper = checkpoint.Keeper(folder / "checkpoints", config_hash(config), config.runtime.keep_checkpoints, start)

    def save(step: int, content: dict) -> None:
        desk.lease.check()
        keeper.save(step, content)

    return save


def _result(config: Config, trainer: Trainer, attempts: int) -> dict:
    return {
        "config_hash": config_hash(config),
        "epochs": config.epochs,
        "steps": trainer.total_steps,
        "headline": trainer.task.headline,
        "metrics": trainer.progress.metrics,
        "weights_sha256": checkpoint.weights_digest(trainer.model),
        "attempts": attempts,
        "seconds": round(trainer.progress.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextmanager
def _removed_if_unusable(folder: Path, new: bool) -> Iterator[None]:
    """A new folder goes again when bad input shows before anything was trained."""
    try:
        yield
    except UserError:
        if new and newest(folder / "checkpoints") is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _refusal_is_bad_input(group: str) -> Iterator[None]:
    """Values that only the component itself can judge."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{group}: {error}") from error


@contextmanager
def _disk_named(folder: Path) -> Iterator[None]:
    """A full or failing disk in one sentence; earlier checkpoints are untouched."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
            raise
        raise UserError(
            f"expected to write into {folder}, got: {error.strerror}; mend that, and the same command continues "
            "from the last checkpoint.",
            "node" if error.errno in (errno.EIO, errno.ESTALE) else "disk",
        ) from error


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Torch's global switches for this run; put back afterwards."""
    runtime = config.runtime
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(runtime.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not runtime.deterministic
    try:
        with torch.autograd.set_detect_anomaly(runtime.anomaly):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _failure_recorded(folder: Path) -> Iterator[list[_Desk]]:
    """``failure.json`` says why a run failed, until it is started again.

    Gives a list to put the desk into once it has taken the run.
    """
    ours: list[_Desk] = []
    try:
        yield ours
    except (StoppedError, RunBusyError):
        raise
    except Exception as error:
        if folder.is_dir() and (ours[0].is_ours() if ours else not is_held(folder)):
            with suppress(OSError):
                record_error(folder, error, first=place_of_this_rank()[0] == 0)
        if isinstance(error, NonFiniteError):
            raise TrainingFailedError(str(error)) from error
        raise


@contextmanager
def _profiled(config: Config, folder: Path | None) -> Iterator[None]:
    """With ``runtime.profile``: a Chrome trace of the whole (short) run in ``profile.json``."""
    if not config.runtime.profile or folder is None:
        yield
        return
    with torch.profiler.profile(record_shapes=True) as profiler:
        yield
    profiler.export_chrome_trace(str(folder / "profile.json"))
    (folder / "profile.txt").write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"optim.lr": 0.1, ...} with values that TensorBoard's HParams takes."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
