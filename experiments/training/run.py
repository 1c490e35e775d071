"""One run: a configuration and its folder in, objects made, a trained folder out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import yaml

from experiments.config import Config, build, config_hash, options_of, run_name, to_tree
from experiments.errors import TrainingFailedError, UserError
from experiments.models import build_model
from experiments.training import checkpoint
from experiments.training.data import Batches
from experiments.training.datasets import ImageData, fingerprint
from experiments.training.files import is_locked, locked, remove_leftovers, write_atomically, write_json
from experiments.training.log import RunLog
from experiments.training.loop import Trainer, total_steps
from experiments.training.optim import build_optimizer
from experiments.training.parallel import Ranks, choose_device, joined_ranks
from experiments.training.provenance import record_attempt
from experiments.training.randomness import seed_torch
from experiments.training.stop import StopRequest, listening


def folder_of(config: Config) -> Path:
    """Where this run lives: ``runs/<experiment>/<readable name>-<hash>``."""
    return Path(config.runtime.runs) / config.experiment / run_name(config)


def prepare_folder(config: Config) -> Path:
    """Make the run folder with its ``config.yaml``; an unfinished run's takes over this start's ``runtime``.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder_of(config)
    text = yaml.safe_dump(to_tree(config), sort_keys=False).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        if not path.exists() or (path.read_bytes() != text and result_of(folder) is None):
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.") from None
    return folder


def result_of(folder: Path) -> dict | None:
    """The content of ``result.json``: it exists when the run is finished."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None


def state_of(folder: Path) -> str:
    """In a word: finished, running, failed, resumable, or missing."""
    if (folder / "result.json").exists():
        return "finished"
    if is_locked(folder):
        return "running"
    if (folder / "failure.json").exists():
        return "failed"
    return "resumable" if checkpoint.newest(folder / "checkpoints") else "missing"


def run(config: Config) -> dict:
    """Train (or continue, or merely report) one run.

    Args:
        config: the run; its folder follows from it.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: data, device or folder are not as expected.
        RunBusyError: another process trains this run.
        StoppedError: asked to stop; the same call continues.
        TrainingFailedError: no use to go on; ``failure.json`` says why.
    """
    stop = StopRequest(None if config.runtime.deadline_minutes is None else 60 * config.runtime.deadline_minutes)
    device = choose_device(config.runtime.device)
    with listening(stop), joined_ranks(device) as ranks:
        new = not folder_of(config).exists()
        folder = prepare_folder(config) if ranks.first else folder_of(config)
        with locked(folder) if ranks.first else nullcontext(), _removed_if_unusable(folder, new and ranks.first):
            finished = ranks.from_first(result_of(folder))
            if finished is not None:
                return finished
            with _settings(config), _failure_recorded(folder, ranks):
                return _train(config, folder, device, ranks, stop)


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
    seed_torch(config.seed, "initialisation")
    with _refusal_is_bad_input("model"):
        model = build_model(
            config.model["name"],
            num_classes=len(data.classes),
            in_channels=data.channels,
            image_size=data.image_size,
            **options_of(config.model),
        )
    with _refusal_is_bad_input("method"):
        method = build(config.method)
        applied = method.apply(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device, memory_format=memory_format)

    notes: list[str] = []
    state = _load_state(config, folder, ranks, notes.append)
    if state is not None:
        method.match(model, state["model"])
    with _refusal_is_bad_input("optim"):
        optimizer = build_optimizer(config.optim, method, model)
    schedule = build(config.schedule)
    steps = total_steps(config, batches.steps_per_epoch)
    log = RunLog(folder if ranks.first else None, state["events"] if state else {}, _flat(to_tree(config)))
    hash_, keep = config_hash(config), config.runtime.keep_checkpoints
    trainer = Trainer(
        config,
        model,
        method,
        optimizer,
        lambda step: schedule.factor(step, batches.steps_per_epoch, steps),
        batches,
        log,
        stop,
        ranks,
        lambda step, content: checkpoint.save(folder / "checkpoints", step, content, hash_, keep),
    )
    if state is not None:
        trainer.load_state(state)
    try:
        for note in [*notes, *([applied] if applied else [])]:
            log.say(note)
        attempts = 0
        if ranks.first:
            attempts = record_attempt(folder, device, ranks.size, trainer.progress.step, fingerprint(data))
        log.say(f"{folder.name}: {'continues at' if state else 'starts at'} step {trainer.progress.step} of {steps}")
        with _profiled(config, folder if ranks.first else None):
            metrics = trainer.run()
        result = {
            "config_hash": hash_,
            "epochs": config.epochs,
            "steps": steps,
            "metrics": metrics,
            "weights_sha256": checkpoint.weights_digest(model),
            "attempts": attempts,
            "seconds": round(trainer.progress.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        log.say(f"finished after {result['seconds']:.0f} s")
    finally:
        log.close()
    if ranks.first:
        write_json(folder / "result.json", result)
    return result


def _load_data(config: Config, ranks: Ranks) -> ImageData:
    # The first rank downloads; the others read what it left.
    data = build(config.data) if ranks.first else None
    ranks.highest(0)
    return build(config.data) if data is None else data


def _load_state(config: Config, folder: Path, ranks: Ranks, report) -> dict | None:
    # The first rank chooses, so that all read the same file.
    path = None
    if ranks.first:
        remove_leftovers(folder)
        path = checkpoint.newest_good(folder / "checkpoints", config_hash(config), report)
    path = ranks.from_first(path)
    return None if path is None else checkpoint.load(path, config_hash(config))


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
    except (TypeError, ValueError) as error:
        raise UserError(f"{group}: {error}") from error


@contextmanager
def _settings(config: Config) -> Iterator[None]:
    """Torch's global switches for this run; put back afterwards."""
    runtime = config.runtime
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
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


@contextmanager
def _failure_recorded(folder: Path, ranks: Ranks) -> Iterator[None]:
    """``failure.json`` says why a run failed, until it is started again."""
    path = folder / "failure.json"
    if ranks.first:
        path.unlink(missing_ok=True)
    try:
        yield
    except TrainingFailedError as error:
        if ranks.first:
            write_json(path, {"kind": "non-finite", "reason": str(error)})
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
