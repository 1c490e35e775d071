"""One run: a configuration and its folder in, objects made, a trained folder out."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from experiments.config import Config, build, config_hash, options_of, to_tree
from experiments.errors import TrainingFailedError, UserError
from experiments.models import build_model
from experiments.training import checkpoint
from experiments.training.data import Batches
from experiments.training.datasets import ImageData, fingerprint
from experiments.training.files import locked, remove_leftovers, write_json
from experiments.training.folder import folder_of, prepare_folder, result_of
from experiments.training.log import RunLog, lost_events
from experiments.training.loop import Trainer, total_steps
from experiments.training.optim import build_optimizer
from experiments.training.parallel import Ranks, choose_device, joined_ranks
from experiments.training.provenance import record_attempt
from experiments.training.randomness import seed_torch
from experiments.training.stop import StopRequest, listening
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
    stop = StopRequest(None if config.runtime.deadline_minutes is None else 60 * config.runtime.deadline_minutes)
    device = choose_device(config.runtime.device)
    folder = folder_of(config)
    with listening(stop), joined_ranks(device) as ranks, ExitStack() as held:
        finished = ranks.agree(lambda: _open(config, folder, held))
        if finished is not None:
            return finished
        with _settings(config), _failure_recorded(folder, ranks), _disk_named(folder):
            return _train(config, folder, device, ranks, stop)


def _open(config: Config, folder: Path, held: ExitStack) -> dict | None:
    """Take the run's folder, until ``held`` is closed; the result instead if the run is finished."""
    finished = result_of(folder)
    if finished is not None:
        return finished
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.") from None
    held.enter_context(_removed_if_unusable(folder, new))
    held.enter_context(locked(folder))
    prepare_folder(config)
    return result_of(folder)


def _train(config: Config, folder: Path, device: torch.device, ranks: Ranks, stop: StopRequest) -> dict:
    data = _load_data(config, ranks)
    batches = Batches(
        data,
        seed=config.seed,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        overfit=config.overfit_batches,
        eval_batch_size=config.eval_batch_size,
        workers=config.runtime.workers,
        ranks=ranks,
        device=device,
    )
    model, method, applied = _network(config, data, device)
    notes: list[str] = []
    state = _load_state(config, folder, ranks, notes.append)
    if state is not None:
        method.match(model, state["model"])
    with _refusal_is_bad_input("optim"):
        optimizer = build_optimizer(config.optim, method, model)
    log = RunLog(folder if ranks.first else None, state["events"] if state else {}, _flat(to_tree(config)))
    try:
        factor, save = _factor(config, batches.steps_per_epoch), _saver(config, folder)
        trainer = Trainer(config, model, method, optimizer, factor, batches, log, stop, ranks, save)
        if state is not None:
            trainer.load_state(state)
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
    result = _result(config, trainer, attempts)
    if ranks.first:
        write_json(folder / "result.json", result)
    return result


def _load_data(config: Config, ranks: Ranks) -> ImageData:
    """The first rank downloads; the others read what it left."""
    loaded: list[ImageData] = []

    def load() -> None:
        with _refusal_is_bad_input("data"):
            loaded.append(build(config.data))

    ranks.agree(load)
    if not ranks.first:
        load()
    return loaded[0]


def _network(config: Config, data: ImageData, device: torch.device) -> tuple[nn.Module, Method, str | None]:
    """The model on its device with the method applied, the method, and what it says it did."""
    seed_torch(config.seed, "initialisation")
    sizes = {"in_channels": data.channels, "image_size": data.image_size}
    with _refusal_is_bad_input("model"):
        model = build_model(config.model["name"], len(data.classes), **sizes, **options_of(config.model))
    with _refusal_is_bad_input("method"):
        method = build(config.method)
        applied = method.apply(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format), method, applied


def _load_state(config: Config, folder: Path, ranks: Ranks, report: Callable[[str], None]) -> dict | None:
    """The newest good checkpoint; the first rank chooses, so that all read the same file."""

    def choose() -> Path | None:
        remove_leftovers(folder)
        return checkpoint.newest_good(
            folder / "checkpoints", config_hash(config), report, lambda state: lost_events(folder, state["events"])
        )

    path = ranks.agree(choose)
    return None if path is None else checkpoint.load(path, config_hash(config))


def _factor(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    with _refusal_is_bad_input("schedule"):
        schedule = build(config.schedule)
    steps = total_steps(config, steps_per_epoch)
    return lambda step: schedule.factor(step, steps_per_epoch, steps)


def _saver(config: Config, folder: Path) -> Callable[[int, dict], None]:
    hash_, keep = config_hash(config), config.runtime.keep_checkpoints
    return lambda step, content: checkpoint.save(folder / "checkpoints", step, content, hash_, keep)


def _result(config: Config, trainer: Trainer, attempts: int) -> dict:
    return {
        "config_hash": config_hash(config),
        "epochs": config.epochs,
        "steps": trainer.total_steps,
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
        if new and checkpoint.newest(folder / "checkpoints") is None:
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
            "from the last checkpoint."
        ) from error


@contextmanager
def _settings(config: Config) -> Iterator[None]:
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
def _failure_recorded(folder: Path, ranks: Ranks) -> Iterator[None]:
    """``failure.json`` says why a run failed, until it is started again."""
    path = folder / "failure.json"
    if ranks.first:
        path.unlink(missing_ok=True)
    try:
        yield
    except (TrainingFailedError, NonFiniteError) as error:
        if ranks.first:
            write_json(path, {"kind": "non-finite", "reason": str(error)})
        raise TrainingFailedError(str(error)) from error


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
