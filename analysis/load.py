"""Run folders: what each one says, how far it came, and what is wrong with it.

A run folder is ``runs/<experiment>/<name>-<8 hex>/`` with ``config.yaml``, ``provenance.json``,
event files and, once finished, ``result.json``. Whatever does not add up becomes a
:class:`Problem` of the run: one sentence with the folder and a cure.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from analysis.cache import Cache
from analysis.events import LARGEST, Damage, EventLog, read_events
from analysis.identity import faults

SLURM = "slurm"  # folders of this name hold submissions, not runs
_FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, eight times as fast where libyaml is there
_LONG = 8192  # characters; some 30,000 nested brackets are a segmentation fault in the fast loader
_MOST_EPOCHS = 10**6  # of a configuration; each is counted when gaps are looked for
_TOO_LARGE = f"has a whole number beyond {sys.float_info.max:.1e}"
_SAME = 1e-6  # relative; events are stored as float32, result.json as float64


class InputError(Exception):
    """A folder or a name that leads nowhere: says what was expected, what came, and the cure."""


class Status(StrEnum):
    """How far a run came."""

    finished = "finished"
    failed = "failed"
    unfinished = "unfinished"


@dataclass(frozen=True)
class Problem:
    """Something about a run that does not add up."""

    text: str
    spoils: bool  # whether it keeps the run out of every mean


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    experiment: str
    config: dict[str, Any] | None  # None where config.yaml is missing or unusable
    result: dict[str, Any] | None  # content of result.json
    failure: dict[str, Any] | None  # content of failure.json
    status: Status
    events: EventLog
    attempts: tuple[dict[str, Any], ...]
    problems: tuple[Problem, ...]

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
        """The value at the final epoch (of ``train/*``: at the last step), if it was logged."""
        curve = self.curve(tag)
        if tag.startswith("train/"):
            return next(reversed(curve.values()), None)
        return curve.get(self.final_epoch)

    @property
    def command(self) -> str:
        """The command that continues this run, or runs it again."""
        return resume_command(self.experiment, self.folder)


def resume_command(experiment: str, folder: Path) -> str:
    """The command that continues a run."""
    return f"python experiments/{experiment}.py --resume {shlex.quote(str(folder))}"


def load_runs(root: Path, experiment: str | None = None, cache: Cache | None = None) -> dict[str, list[Run]]:
    """All runs under a folder, by experiment; both in the order of their names.

    Args:
        root: the folder of experiments.
        experiment: only this one.
        cache: what earlier readings left; the runs are the same with and without it.

    Raises:
        InputError: no such folder, no such experiment, or no run in it.
    """
    folders = [(name, folder) for name, folders in _find(root, experiment).items() for folder in folders]
    found: dict[str, list[Run]] = {}
    for name, folder in tqdm(folders, desc="reading", unit="run", delay=1, leave=False, disable=None):
        found.setdefault(name, []).append(load_run(folder, cache))
    if not found:
        raise InputError(f"expected run folders {root}/<experiment>/<run>, found none; start one or choose by --runs.")
    return found


def experiments_in(root: Path) -> list[str]:
    """The names of the experiments that have run folders, unread.

    Raises:
        InputError: no such folder.
    """
    return list(_find(root, None))


def _find(root: Path, experiment: str | None) -> dict[str, list[Path]]:
    if not root.is_dir():
        raise InputError(f"expected a folder of runs, got {root}, which is not one; choose by --runs.")
    if any(_exists(folder, "config.yaml") for folder in (root, *_folders(root))):
        raise InputError(f"expected a folder of experiments, got {root}, which holds runs; choose one above by --runs.")
    found = {folder.name: list(_folders(folder)) for folder in _folders(root)}
    found = {name: folders for name, folders in found.items() if folders}
    if experiment is None or not found:
        return found
    if experiment not in found:
        raise InputError(f"no runs of experiment {experiment} in {root}; nearest: {nearest(experiment, found)}.")
    return {experiment: found[experiment]}


def _folders(parent: Path) -> Iterator[Path]:
    try:
        paths = sorted(parent.iterdir())
    except OSError as error:
        text = f"expected a folder that can be read, got {parent} ({error.strerror}); choose others by --experiment"
        raise InputError(f"{text} or --runs.") from None
    for path in paths:
        if os.path.isdir(path) and path.name != SLURM and not path.name.startswith("."):
            yield path


def _exists(folder: Path, name: str) -> bool:
    """Whether a folder has a file; a folder that cannot be looked into has none."""
    return os.path.exists(folder / name)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known names closest to a word, for the end of an error message."""
    known = sorted(known)
    return ", ".join(difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known[:8])


def load_run(folder: Path, cache: Cache | None = None) -> Run:
    """Read one run folder and check that its parts agree."""
    problems: list[Problem] = []
    experiment = folder.parent.name
    config = read_config(folder, problems)
    result = _read_json(folder, "result.json", problems, spoils=True)
    failure = _read_json(folder, "failure.json", problems, spoils=False)
    provenance = _read_json(folder, "provenance.json", problems, spoils=False)
    status = _status(folder)
    events = read_events(folder) if cache is None else cache.read_events(folder)
    attempts = _attempts(folder, provenance, problems)
    below = _events_below(folder)
    problems += _state_problems(folder, status, failure, events, config, below)
    if below:
        text = f"{folder}: event files in {', '.join(below)} are not read"
        problems.append(Problem(f"{text}; move them up if they are of this run, and elsewhere if not.", spoils=False))
    problems += [_damage_problem(folder, damage, status) for damage in events.damages]
    problems += _skipped_problems(folder, events)
    problems += _duplicate_problems(folder, events)
    if config is not None:
        mixed = faults(folder, config, result, attempts, events.files)
        problems += [_spoiled(folder, fault, "restore it from a copy, or delete it and train anew") for fault in mixed]
        problems += _place_problems(folder, config)
        problems += _epoch_problems(folder, config, events, status)
        problems += _curve_problems(folder, config, events, status)
    if config is not None and result is not None:
        problems += _result_problems(folder, config, result, events)
    return Run(folder, experiment, config, result, failure, status, events, attempts, tuple(problems))


def _events_below(folder: Path) -> list[str]:
    """The subfolders that have event files."""
    found = [parent for parent, _, names in os.walk(folder) if any("tfevents" in name for name in names)]
    return sorted(os.path.relpath(parent, folder) for parent in found if parent != str(folder))


def _status(folder: Path) -> Status:
    if _exists(folder, "result.json"):
        return Status.finished
    return Status.failed if _exists(folder, "failure.json") else Status.unfinished


def read_config(folder: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The content of a run's ``config.yaml``; None, and one more problem, where it is unusable."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, _FAST_LOADER if len(text) < _LONG else yaml.SafeLoader)
        wrong = _config_fault(config)
    except FileNotFoundError:
        wrong = "is missing"
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        wrong = "cannot be read"
    if wrong is None:
        return config
    problems.append(
        _spoiled(folder, f"config.yaml {wrong}", "restore it, or delete the folder and start the run again")
    )
    return None


def _config_fault(config: Any) -> str | None:
    if not isinstance(config, dict):
        return "is not a mapping"
    if beyond_floats(config):
        return _TOO_LARGE
    for key, least in (("seed", 0), ("epochs", 1), ("eval_every", 1)):
        value = config.get(key, 1 if key == "eval_every" else None)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"has no whole number of at least {least} as {key}"
    if config["epochs"] > _MOST_EPOCHS:
        return f"has more than {_MOST_EPOCHS} as epochs"
    method = config.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        return "names no method"
    return None


def _read_json(folder: Path, name: str, problems: list[Problem], spoils: bool) -> dict[str, Any] | None:
    wrong = "cannot be read"
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        wrong = _TOO_LARGE if beyond_floats(content) else None if isinstance(content, dict) else wrong
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    if wrong is None:
        return content
    problems.append(Problem(f"{folder}: {name} {wrong}; {_redo(folder)}.", spoils))
    return None


def beyond_floats(tree: Any) -> bool:
    """Whether what a JSON or YAML file holds has a whole number that is too large for a float.

    Raises:
        RecursionError: it holds itself, as an anchor of YAML may, or is nested too deeply to be worked with.

    Example:
        >>> beyond_floats({"lr": [0.1, 10**308]}), beyond_floats({"lr": [0.1, 10**309]})
        (False, True)
    """
    if isinstance(tree, dict | list | tuple | set):
        return any(map(beyond_floats, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, int) and abs(tree) > sys.float_info.max


def _attempts(folder: Path, provenance: dict | None, problems: list[Problem]) -> tuple[dict[str, Any], ...]:
    attempts = (provenance or {}).get("attempts")
    if isinstance(attempts, list) and attempts and all(isinstance(attempt, dict) for attempt in attempts):
        return tuple(attempts)
    if provenance is not None or not _exists(folder, "provenance.json"):
        text = "provenance.json names no attempt, so commit and versions are unknown"
        problems.append(Problem(f"{folder}: {text}; {_redo(folder)}.", spoils=False))
    return ()


def _state_problems(
    folder: Path, status: Status, failure: dict | None, events: EventLog, config: dict | None, below: list[str]
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


def _damage_problem(folder: Path, damage: Damage, status: Status) -> Problem:
    where = f"{damage.file.name}, byte {damage.offset}: {damage.reason}"
    if damage.truncated and damage.restarted:
        text = f"{folder}: damaged event file {where}; the run was then resumed and wrote on, so nothing need be done."
        return Problem(text, spoils=False)
    cure = _redo(folder) if status == Status.finished else _again(folder)
    return _spoiled(folder, f"damaged event file {where}", cure)


def _skipped_problems(folder: Path, events: EventLog) -> list[Problem]:
    if not events.skipped:
        return []
    count, first = len(events.skipped), events.skipped[0]
    text = f"{first.file.name}, byte {first.offset}: a record of more than {LARGEST >> 20} MiB was not read"
    more = f", nor were {count - 1} others" if count > 1 else ""
    return [Problem(f"{folder}: {text}{more}; log scalars apart from images.", spoils=False)]


def _duplicate_problems(folder: Path, events: EventLog) -> list[Problem]:
    found = []
    for tag, points in sorted(events.series.items()):
        steps = points.repeated_steps()
        if steps:
            unit = "step" if tag.startswith("train/") else "epoch"
            text = f"duplicate points of {tag} at {unit} {_list(steps)}; the last of each is taken as the point"
            found.append(Problem(f"{folder}: {text}, {_redo(folder)}.", spoils=False))
    return found


def _place_problems(folder: Path, config: dict) -> list[Problem]:
    said = config.get("experiment", folder.parent.name)
    if said == folder.parent.name:
        return []
    text = f"config.yaml says experiment {said}, but the run lies under {folder.parent.name}"
    return [_spoiled(folder, text, f"move it to {folder.parent.parent / str(said)}/")]


def _epoch_problems(folder: Path, config: dict, events: EventLog, status: Status) -> list[Problem]:
    found, most = [], config["epochs"]
    for tag, points in sorted(events.series.items()):
        if not _is_test(tag):
            continue
        seen = set(points.steps)
        beyond = sorted(epoch for epoch in seen if not 1 <= epoch <= most)
        last = final_epoch(config, events) if status == Status.finished else max(seen.difference(beyond), default=0)
        missing = sorted(expected_epochs(last, config.get("eval_every", 1)) - seen)
        if missing:
            text = f"{tag} is missing at epoch {_list(missing)}"
            found.append(Problem(f"{folder}: {text}; {_redo(folder)}.", spoils=last in missing))
        if beyond:
            found.append(_spoiled(folder, f"{tag} has epoch {_list(beyond)} outside 1 to {most}", _redo(folder)))
    if status == Status.finished and events.series and not any(_is_test(tag) for tag in events.series):
        found.append(_spoiled(folder, "finished, but without test/* points", _redo(folder)))
    return found


def _curve_problems(folder: Path, config: dict, events: EventLog, status: Status) -> list[Problem]:
    """Points that are not finite; a final one is named where it would enter a mean."""
    final = final_epoch(config, events) if status == Status.finished else None
    found = []
    for tag in sorted(filter(_is_test, events.series)):
        wrong = {epoch: value for epoch, value in events.by_step(tag).items() if not math.isfinite(value)}
        wrong.pop(final, None)
        if wrong:
            values = " or ".join(sorted({f"{value}" for value in wrong.values()}))
            text = f"{tag} is {values} at epoch {_list(list(wrong))}"
            found.append(Problem(f"{folder}: {text}; its curve has a gap there, look into its log.", spoils=False))
    return found


def _result_problems(folder: Path, config: dict, result: dict, events: EventLog) -> list[Problem]:
    found = []
    epochs = result.get("epochs", config["epochs"])
    if epochs != config["epochs"] and config.get("max_steps") is None:
        text = f"result.json says {epochs} epochs, config.yaml {config['epochs']}"
        found.append(_spoiled(folder, text, _redo(folder)))
    metrics = result.get("metrics")
    final = final_epoch(config, events)
    said = {tag: value for tag, value in metrics.items() if tag in events.series} if isinstance(metrics, dict) else {}
    for tag, value in sorted(said.items()):
        logged = events.by_step(tag).get(final)
        comparable = _is_test(tag) or (_is_number(value) and not tag.startswith("train/"))
        if comparable and not _agree(logged, value):
            text = f"final {tag} is {logged} in the events but {json.dumps(value)} in result.json"
            found.append(_spoiled(folder, text, _redo(folder)))
    if not any(map(_is_test, said)) and events.series:
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
    steps = (step for tag, points in events.series.items() if _is_test(tag) for step in points.steps)
    return max((step for step in steps if 1 <= step <= most), default=0)


def expected_epochs(last: int, every: int) -> set[int]:
    """The epochs that are evaluated: every so many, and always the last; none where that is 0."""
    return {*range(every, last + 1, every), *range(last, last + 1 if last else 0)}


def _agree(logged: float | None, value: Any) -> bool:
    if logged is None or not _is_number(value):
        return False
    return math.isclose(logged, value, rel_tol=_SAME, abs_tol=1e-9) or (math.isnan(logged) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_test(tag: str) -> bool:
    return tag.startswith("test/")


def _spoiled(folder: Path, what: str, cure: str) -> Problem:
    return Problem(f"{folder}: {what}; {cure}.", spoils=True)


def _again(folder: Path) -> str:
    return f"start it again: `{resume_command(folder.parent.name, folder)}`"


def _redo(folder: Path) -> str:
    return f"restore the folder from a copy, or delete all of it but config.yaml and {_again(folder)}"


def _list(numbers: list[int]) -> str:
    """``3, 4 and 7``, at most ten of them."""
    words = [str(number) for number in numbers[:10]]
    if len(numbers) > 10:
        return f"{', '.join(words)} and {len(numbers) - 10} more"
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
