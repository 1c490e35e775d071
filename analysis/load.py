"""Run folders: what each one says, how far it came, and what is wrong with it.

What lies in a run folder, :mod:`runfolder` says. Whatever does not add up becomes a
:class:`Problem` of the run: one sentence with the folder and a cure.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.cache import Cache
from analysis.content import read_config, read_json
from analysis.events import EMPTY, LARGEST, Damage, EventLog, read_events
from analysis.identity import faults
from runfolder import tags
from runfolder.errors import UserError, nearest
from runfolder.folder import SUBMISSIONS, RunFolder
from runfolder.records import disagreeing
from runfolder.states import State, is_finished


class Status(StrEnum):
    """How far a run came: a :class:`State` without who works on it, which numbers do not depend on."""

    finished = State.finished
    failed = State.failed
    unfinished = "unfinished"  # running, queued, resumable, missing or cancelled


@dataclass(frozen=True)
class Problem:
    """Something about a run that does not add up."""

    text: str
    spoils: bool  # whether it keeps the run out of every mean


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: RunFolder
    config: dict[str, Any] | None  # None where config.yaml is missing or unusable
    result: dict[str, Any] | None  # content of result.json
    failure: dict[str, Any] | None  # content of failure.json
    status: Status
    events: EventLog
    attempts: tuple[dict[str, Any], ...]
    problems: tuple[Problem, ...]

    @property
    def experiment(self) -> str:
        """The script that trains it."""
        return self.folder.experiment

    @property
    def seed(self) -> int:
        """The seed in its configuration."""
        return self.config["seed"]

    @property
    def usable(self) -> bool:
        """Whether its numbers may enter a mean."""
        return self.status == Status.finished and not any(problem.spoils for problem in self.problems)

    @property
    def last_epoch(self) -> int:
        """The last evaluated epoch; 0 before the first."""
        return last_evaluated(self.events, self.config)

    @property
    def final_epoch(self) -> int:
        """The epoch that its numbers are taken from."""
        return final_epoch(self.config, self.events)

    def curve(self, tag: str) -> dict[int, float]:
        """{step or epoch: value} of a tag, ascending."""
        return self.events.by_step(tag)

    def final_value(self, tag: str) -> float | None:
        """The value at the final epoch (of what counts steps: at the last step), if it was logged."""
        curve = self.curve(tag)
        if tags.counts_steps(tag):
            return next(reversed(curve.values()), None)
        return curve.get(self.final_epoch)

    @property
    def command(self) -> str:
        """The command that continues this run, or runs it again."""
        return resume_command(self.folder)


def resume_command(folder: RunFolder) -> str:
    """The command that continues a run."""
    return f"python experiments/{folder.experiment}.py --resume {shlex.quote(str(folder))}"


def load_runs(root: Path, experiment: str | None = None, cache: Cache | None = None) -> dict[str, list[Run]]:
    """All runs under a folder, by experiment; both in the order of their names.

    Args:
        root: the folder of experiments.
        experiment: only this one.
        cache: what earlier readings left; the runs are the same with and without it.

    Raises:
        UserError: no such folder, no such experiment, or no run in it.
    """
    paths = [(name, path) for name, paths in _find(root, experiment).items() for path in paths]
    found: dict[str, list[Run]] = {}
    for name, path in tqdm(paths, desc="reading", unit="run", delay=1, leave=False, disable=None):
        found.setdefault(name, []).append(load_run(path, cache))
    if not found:
        raise UserError(f"expected run folders {root}/<experiment>/<run>, found none; start one or choose by --runs.")
    return found


def experiments_in(root: Path) -> list[str]:
    """The names of the experiments that have run folders, unread.

    Raises:
        UserError: no such folder.
    """
    return list(_find(root, None))


def _find(root: Path, experiment: str | None) -> dict[str, list[Path]]:
    if not root.is_dir():
        raise UserError(f"expected a folder of runs, got {root}, which is not one; choose by --runs.")
    if any(os.path.exists(RunFolder(path).config) for path in (root, *_folders(root))):
        raise UserError(f"expected a folder of experiments, got {root}, which holds runs; choose one above by --runs.")
    found = {folder.name: list(_folders(folder)) for folder in _folders(root)}
    found = {name: folders for name, folders in found.items() if folders}
    if experiment is None or not found:
        return found
    if experiment not in found:
        raise UserError(f"no runs of experiment {experiment} in {root}; {nearest(experiment, found)}.")
    return {experiment: found[experiment]}


def _folders(parent: Path) -> Iterator[Path]:
    try:
        paths = sorted(parent.iterdir())
    except OSError as error:
        text = f"expected a folder that can be read, got {parent} ({error.strerror}); choose others by --experiment"
        raise UserError(f"{text} or --runs.") from None
    for path in paths:
        if os.path.isdir(path) and path.name != SUBMISSIONS and not path.name.startswith("."):
            yield path


def load_run(path: Path, cache: Cache | None = None) -> Run:
    """Read one run folder and check that its parts agree."""
    folder = RunFolder(path)
    problems: list[Problem] = []
    config, fault = read_config(folder)
    if fault is not None:
        cure = "restore it, or move the folder elsewhere and start the run again"
        problems.append(_spoiled(folder, f"{folder.config.name} {fault}", cure))
    result = _read_record(folder, folder.result, problems, spoils=True)
    failure = _read_record(folder, folder.failure, problems, spoils=False)
    provenance = _read_record(folder, folder.provenance, problems, spoils=False)
    status = _status(folder)
    events = read_events(path) if cache is None else cache.read_events(path)
    attempts = _attempts(folder, provenance, problems)
    below = _events_below(path)
    problems += _state_problems(folder, status, failure, events, config, below)
    if below:
        text = f"{folder}: event files in {', '.join(below)} are not read"
        problems.append(Problem(f"{text}; move them up if they are of this run, and elsewhere if not.", spoils=False))
    problems += [_damage_problem(folder, damage, status, events) for damage in events.damages]
    problems += _skipped_problems(folder, events)
    problems += _duplicate_problems(folder, events)
    if config is not None:
        mixed = faults(folder, config, result, attempts, events.files)
        problems += [
            _spoiled(folder, fault, "restore it from a copy, or move it elsewhere and train anew") for fault in mixed
        ]
        problems += [] if mixed else _place_problems(folder, config)
        problems += _epoch_problems(folder, config, events, status)
        problems += _curve_problems(folder, config, events, status)
    if config is not None and result is not None:
        problems += _result_problems(folder, config, result, events)
    return Run(folder, config, result, failure, status, events, attempts, tuple(problems))


def _read_record(folder: RunFolder, file: Path, problems: list[Problem], spoils: bool) -> dict[str, Any] | None:
    content, fault = read_json(file)
    if fault is not None:
        problems.append(Problem(f"{folder}: {file.name} {fault}; {_redo(folder)}.", spoils))
    return content


def _events_below(folder: Path) -> list[str]:
    """The subfolders that have event files; hidden ones do not count."""
    found = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        if parent != str(folder) and any("tfevents" in name and name[0] != "." for name in names):
            found.add(os.path.relpath(parent, folder))
    return sorted(found)


def _status(folder: RunFolder) -> Status:
    if is_finished(folder):
        return Status.finished
    return Status.failed if os.path.exists(folder.failure) else Status.unfinished


def _attempts(folder: RunFolder, provenance: dict | None, problems: list[Problem]) -> tuple[dict[str, Any], ...]:
    attempts = (provenance or {}).get("attempts")
    if isinstance(attempts, list) and attempts and all(isinstance(attempt, dict) for attempt in attempts):
        return tuple(attempts)
    if provenance is not None or not os.path.exists(folder.provenance):
        text = "provenance.json names no attempt, so commit and versions are unknown"
        problems.append(Problem(f"{folder}: {text}; {_redo(folder)}.", spoils=False))
    return ()


def _state_problems(
    folder: RunFolder, status: Status, failure: dict | None, events: EventLog, config: dict | None, below: list[str]
) -> list[Problem]:
    again = _again(folder)
    if status == Status.failed:
        reason = (failure or {}).get("reason") or (failure or {}).get("kind") or "of an unknown reason"
        step = f" at step {failure['step']}" if failure and "step" in failure else ""
        return [_spoiled(folder, f"failed{step}: {' '.join(str(reason).split()).rstrip('.')}", again)]
    if status == Status.unfinished:
        planned = f" of {config['epochs']}" if config else ""
        return [_spoiled(folder, f"unfinished, last evaluated epoch {last_evaluated(events, config)}{planned}", again)]
    found = []
    if failure is not None:
        text = f"{folder}: has both result.json and failure.json; delete failure.json if the run is good."
        found.append(Problem(text, spoils=False))
    if not events.series and not events.damages:
        cure = "move up those in its subfolders" if below else _redo(folder)
        found.append(_spoiled(folder, "finished, but without events", cure))
    return found


def _damage_problem(folder: RunFolder, damage: Damage, status: Status, events: EventLog) -> Problem:
    where = f"{damage.file.name}, byte {damage.offset}: {damage.reason}"
    if damage.truncated and damage.restarted:
        text = f"{folder}: damaged event file {where}; the run was then resumed and wrote on, so nothing need be done."
        return Problem(text, spoils=False)
    if damage.reason == EMPTY and events.series:  # what may be missing is named with its epochs
        text = f"{folder}: {damage.file.name} is empty; the other event files are read."
        return Problem(text, spoils=False)
    cure = _redo(folder) if status == Status.finished else _again(folder)
    return _spoiled(folder, f"damaged event file {where}", cure)


def _skipped_problems(folder: RunFolder, events: EventLog) -> list[Problem]:
    if not events.skipped:
        return []
    count, first = len(events.skipped), events.skipped[0]
    text = f"{first.file.name}, byte {first.offset}: a record of more than {LARGEST >> 20} MiB was not read"
    more = f", nor were {count - 1} others" if count > 1 else ""
    return [Problem(f"{folder}: {text}{more}; log scalars apart from images.", spoils=False)]


def _duplicate_problems(folder: RunFolder, events: EventLog) -> list[Problem]:
    found = []
    for tag, points in sorted(events.series.items()):
        steps = points.repeated_steps()
        if steps:
            text = (
                f"duplicate points of {tag} at {tags.axis(tag)} {_list(steps)}; the last of each is taken as the point"
            )
            found.append(Problem(f"{folder}: {text}, {_redo(folder)}.", spoils=False))
    return found


def _place_problems(folder: RunFolder, config: dict) -> list[Problem]:
    said = config.get("experiment", folder.experiment)
    if said == folder.experiment:
        return []
    text = f"config.yaml says experiment {said}, but the run lies under {folder.experiment}"
    return [_spoiled(folder, text, f"move it to {folder.runs / str(said)}/")]


def _epoch_problems(folder: RunFolder, config: dict, events: EventLog, status: Status) -> list[Problem]:
    found, most = [], config["epochs"]
    first = 0 if config.get("eval_start") else 1
    for tag, points in sorted(events.series.items()):
        if not tags.is_test(tag):
            continue
        seen = set(points.steps)
        beyond = sorted(epoch for epoch in seen if not first <= epoch <= most)
        last = final_epoch(config, events) if status == Status.finished else max(seen.difference(beyond), default=0)
        missing = sorted(expected_epochs(last, config.get("eval_every", 1)) - seen)
        if missing:
            text = f"{tag} is missing at epoch {_list(missing)}"
            found.append(Problem(f"{folder}: {text}; {_redo(folder)}.", spoils=last in missing))
        if beyond:
            found.append(_spoiled(folder, f"{tag} has epoch {_list(beyond)} outside {first} to {most}", _redo(folder)))
    if status == Status.finished and events.series and not any(tags.is_test(tag) for tag in events.series):
        found.append(_spoiled(folder, "finished, but without test/* points", _redo(folder)))
    return found


def _curve_problems(folder: RunFolder, config: dict, events: EventLog, status: Status) -> list[Problem]:
    """Points that are not finite; a final one is named where it would enter a mean."""
    final = final_epoch(config, events) if status == Status.finished else None
    found = []
    for tag in sorted(filter(tags.is_test, events.series)):
        wrong = {epoch: value for epoch, value in events.by_step(tag).items() if not math.isfinite(value)}
        wrong.pop(final, None)
        if wrong:
            values = " or ".join(sorted({f"{value}" for value in wrong.values()}))
            text = f"{tag} is {values} at epoch {_list(list(wrong))}"
            found.append(Problem(f"{folder}: {text}; its curve has a gap there, look into its log.", spoils=False))
    return found


def _result_problems(folder: RunFolder, config: dict, result: dict, events: EventLog) -> list[Problem]:
    found = []
    epochs = result.get("epochs", config["epochs"])
    if epochs != config["epochs"] and config.get("max_steps") is None:
        text = f"result.json says {epochs} epochs, config.yaml {config['epochs']}"
        found.append(_spoiled(folder, text, _redo(folder)))
    metrics = result.get("metrics")
    final = final_epoch(config, events)
    said = {tag: value for tag, value in metrics.items() if tag in events.series} if isinstance(metrics, dict) else {}
    logged = {tag: events.by_step(tag).get(final) for tag in said}
    for tag in disagreeing(said, logged):
        text = f"final {tag} is {logged[tag]} in the events but {json.dumps(said[tag])} in result.json"
        found.append(_spoiled(folder, text, _redo(folder)))
    if not any(map(tags.is_test, said)) and events.series:
        text = "result.json has no test/* metric to compare the events with"
        if config.get("max_steps") is None:
            found.append(Problem(f"{folder}: {text}; restore it if there is a copy.", spoils=False))
        else:
            found.append(_spoiled(folder, f"{text}, and it alone says where max_steps ended the run", _redo(folder)))
    return found


def final_epoch(config: dict[str, Any], events: EventLog) -> int:
    """The last epoch of a finished run: as configured.

    Where ``max_steps`` may have ended it earlier it is the last evaluated one; that this is
    the end is then known from ``result.json``, whose numbers must be the same.
    """
    return config["epochs"] if config.get("max_steps") is None else last_evaluated(events, config)


def last_evaluated(events: EventLog, config: dict[str, Any] | None) -> int:
    """The last epoch with a ``test/*`` point, of those that are configured; 0 before the first."""
    most = math.inf if config is None else config["epochs"]
    steps = (step for tag, points in events.series.items() if tags.is_test(tag) for step in points.steps)
    return max((step for step in steps if 1 <= step <= most), default=0)


def expected_epochs(last: int, every: int) -> set[int]:
    """The epochs that are evaluated: every so many, and always the last; none where that is 0."""
    return {*range(every, last + 1, every), *range(last, last + 1 if last else 0)}


def _spoiled(folder: RunFolder, what: str, cure: str) -> Problem:
    return Problem(f"{folder}: {what}; {cure}.", spoils=True)


def _again(folder: RunFolder) -> str:
    return f"start it again: `{resume_command(folder)}`"


def _redo(folder: RunFolder) -> str:
    return f"restore the folder from a copy, or move all of it but config.yaml elsewhere and {_again(folder)}"


def _list(numbers: list[int]) -> str:
    """``3, 4 and 7``, at most ten of them."""
    words = [str(number) for number in numbers[:10]]
    if len(numbers) > 10:
        return f"{', '.join(words)} and {len(numbers) - 10} more"
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
