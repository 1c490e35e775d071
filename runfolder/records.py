"""What the JSON files in a run folder hold.

A file that a killed process or a full disk has damaged is read as an empty record, so every
key may be missing when a record is read; who writes one gives all of them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from runfolder import tags
from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import read_json
from runfolder.folder import RunFolder

Record = TypeVar("Record")
_SAME = 1e-6  # relative; events hold float32, result.json float64


class Result(TypedDict, total=False):
    """``result.json``, written once, last."""

    config_hash: str
    epochs: int
    steps: int
    primary_metric: str  # the tag that the run is known by
    metrics: dict[str, float]  # of the last evaluation, by tag: the same numbers as the last points of the events
    weights_sha256: str
    attempts: int  # that were needed
    seconds: float  # of training and evaluation, over all attempts
    train_seconds: float  # without evaluations
    finished: str  # UTC, ISO 8601


class Progress(TypedDict, total=False):
    """``progress.json``, written at every heartbeat."""

    step: int
    steps: int
    epoch: float
    epochs: float
    primary_metric: str
    value: float | None  # of the primary metric at the last evaluation
    images_per_second: float
    seconds_left: int
    host: str


class Failure(TypedDict, total=False):
    """``failure.json``; gone when the run is started again."""

    kind: str  # a FailureKind
    reason: str
    host: str
    when: str
    traceback: list[str]  # its end


class Attempt(TypedDict, total=False):
    """One start of training, as it describes itself in ``provenance.json``: ``{"attempts": [...]}``."""

    started: str  # UTC, ISO 8601
    command: str
    commit: str | None  # None: unknown
    dirty: bool | None  # None: unknown
    unknown: str | None  # why these are
    diff: str | None  # a file in the run folder
    untracked: list[str]
    packages: dict[str, str]
    hardware: dict[str, str | int]  # device, cores, threads, host
    switches: dict[str, str | int | bool]  # torch's global ones: deterministic kernels, precision of products, ...
    world_size: int
    data: str  # fingerprint of the data set
    resumed_from_step: int


class Process(TypedDict, total=False):
    """What tells a process from every other one; see :func:`runfolder.process.this_process`."""

    host: str
    boot: str
    processes: str
    pid: int
    began: str


class Holder(Process, total=False):
    """A ticket in ``lease/``: who trains the run. Its modification time is the last sign of life."""

    job: str  # of Slurm, and how often it had been started again
    restart: int
    beats_every: float  # seconds
    since: str
    released: bool


class Claim(Process, total=False):
    """A ticket in ``claims/``: which submission is to train the run."""

    user: int
    folder: str  # the run folder that it was made in, and its number on the file system: a copied claim is nobody's
    inode: int
    submission: str
    made: float  # seconds since 1970
    submitted: bool
    scheduler: str
    job: str
    job_name: str
    index: int
    worker: Process  # that trains it, where there is no scheduler
    released: str | None  # why it was given back


class AttemptNote(TypedDict, total=False):
    """A ticket in ``attempts/``: a supervisor's note of an attempt. Without an outcome it was cut off."""

    started: str
    from_step: int
    job: str
    restart: int
    node: str
    submission: str
    reached_step: int | None
    saved_step: int
    ended: str
    outcome: str
    reason: str


def read_record(path: Path, kind: type[Record]) -> Record:
    """A record in a JSON file, without values of other types than it has; {} where there is none or it is damaged."""
    types = _types_of(kind)
    return {key: value for key, value in read_json(path).items() if _fits(value, types.get(key, object))}


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if kind in (int, float):
        return is_number(value) and (kind is float or isinstance(value, int))
    if is_typeddict(kind):
        return isinstance(value, dict) and all(
            _fits(value[key], own) for key, own in _types_of(kind).items() if key in value
        )
    return isinstance(value, get_origin(kind) or kind)


def read_result(folder: RunFolder) -> Result | None:
    """The content of ``result.json``: it exists when the run is finished.

    Raises:
        UserError: the file is damaged.
    """
    try:
        result = json.loads(folder.result.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"expected to read {folder.result}, got: {error.strerror}; the run is finished, and its result is there "
            "when the file can be read.",
            FailureKind.disk,
        ) from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise UserError(
            f"expected the result of a run in {folder.result}, got something else; move this file elsewhere and start "
            "the run again, which writes it from the last checkpoint."
        )
    return result


def disagreeing(metrics: Mapping[str, Any], logged: Mapping[str, float | None]) -> list[str]:
    """The tags whose final value is another one in the events than in ``result.json``, by name.

    What counts steps has no final epoch, and of what is no measure of the test set only numbers are compared.

    Args:
        metrics: those of a result, as read: any value may be there.
        logged: the value of each at the final epoch in the events; None where there is none.
    """
    compared = [tag for tag, value in metrics.items() if tags.is_test(tag) or is_number(value)]
    return sorted(tag for tag in compared if not tags.counts_steps(tag) and not _is_same(logged.get(tag), metrics[tag]))


def _is_same(logged: float | None, said: Any) -> bool:
    if logged is None or not is_number(said):
        return False
    return math.isclose(logged, said, rel_tol=_SAME, abs_tol=1e-9) or (math.isnan(logged) and math.isnan(said))


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
