"""How a cluster is asked for jobs: a profile from a YAML file, checked, plus command-line changes.

Nothing here changes a result. A profile is looked for by name in the folders of TRACT_CLUSTERS, in
``clusters/`` beside this package (git ignores it), in ``~/.config/tract/clusters`` and in
``experiments/conf/cluster``, or given as the path of a YAML file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from runfolder.errors import UserError, nearest
from runfolder.folder import typed
from runfolder.records import is_number

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "experiments" / "conf" / "cluster"
_OF_REPOSITORY = ROOT / "clusters"


class Scheduler(StrEnum):
    """What starts the jobs: Slurm, or processes on this machine."""

    slurm = "slurm"
    local = "local"


@dataclass
class Cluster:
    """How and where jobs run. Nothing here changes a result, and nothing enters a run's name."""

    scheduler: Scheduler = Scheduler.slurm
    partition: str | None = None  # null: the cluster's default; several, comma separated: whichever starts first
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features a node must have
    exclude: str | None = None  # nodes to avoid
    reservation: str | None = None
    timeout_minutes: int = 1440  # a job's time limit; a run that needs longer continues in the next job
    signal_seconds: int = 120  # USR2 so long before the limit: time for a checkpoint
    gpus_per_node: int = 8  # GPUs a node has to give; a run with more takes several nodes; 0: no GPUs, runs use CPUs
    nodes: int | None = None  # null: from the run's number of GPUs
    tasks_per_node: int | None = None  # null: from the run's number of GPUs
    cpus_per_task: int = 8  # per GPU; data loading uses them
    cpus_without_gpu: int = 2  # of a run that is given no GPU
    memory_gb: float | None = None  # per node; null: the cluster's default
    parallel: int = 64  # most jobs at a time: the array's throttle; with scheduler=local runs side by side
    max_array_size: int | None = None  # null: ask Slurm
    runs_per_gpu: int = 1  # runs that share a GPU
    gpus_per_job: int | None = None  # GPUs of a job that packs runs; null: 1
    setup: list[str] = field(default_factory=list)  # shell lines before python: modules, exports
    container: str = ""  # written before python: apptainer exec --nv image.sif
    python: str | None = None  # path of the interpreter, without arguments; null: the one that submits
    extra: dict[str, Any] = field(default_factory=dict)  # further sbatch options: {mail-type: FAIL}
    stage_from: str | None = None  # data that each node copies before training: a folder or an archive
    stage_to: str | None = None  # where to: a disk of the node; ~ and $VARIABLES are expanded there
    stage_keep_hours: float = 24.0  # unused copies are removed after so long
    max_requeues: int = 100  # of one job
    max_fruitless: int = 4  # attempts in a row without a new checkpoint
    free_gib: float = 5.0  # disk that must be free below runs/


def _all_words(values: list | dict) -> bool:
    return all(isinstance(value, str) for value in values)


_TYPES = {f.name: [option.strip() for option in f.type.split("|")] for f in fields(Cluster)}
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a word", lambda value: isinstance(value, str)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", is_number),
    "list[str]": ("a list of shell lines", lambda value: isinstance(value, list) and _all_words(value)),
    "dict[str, Any]": ("options as {name: value}", lambda value: isinstance(value, dict) and _all_words(value)),
    "Scheduler": (" or ".join(Scheduler), lambda value: isinstance(value, str) and value in list(Scheduler)),
    "None": ("null", lambda value: value is None),
}
# sbatch options that have a field of their own, and those that belong to the launcher.
_FIELD_OF_OPTION = {name: name for name in ("partition", "account", "qos", "constraint", "exclude", "reservation")} | {
    "time": "timeout_minutes",
    "signal": "signal_seconds",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory_gb",
}
_OPTIONS_OF_LAUNCHER = ("array", "job-name", "output", "error", "open-mode", "requeue", "no-requeue", "wrap", "chdir")


def load_cluster(name: str | None = None, changes: dict[str, Any] | None = None) -> Cluster:
    """A profile with its bases and the command line's changes, validated.

    Args:
        name: a profile's name, or a path ending in .yaml. None: TRACT_CLUSTER, else slurm.
        changes: {key: value} of the command line's ``cluster.KEY=VALUE``.

    Raises:
        UserError: no such profile, an unknown key or a bad value, with the file it stands in.
    """
    from omegaconf import OmegaConf  # which jobs, who read what is written down, can do without

    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for path, content in reversed(_lineage(name or os.environ.get("TRACT_CLUSTER") or "slurm")):
        _merge(values, places, content, f" in {path}")
    plain = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in (changes or {}).items()}
    _merge(values, places, plain, "")
    return _checked(values, places)


def from_tree(tree: dict[str, Any], changes: dict[str, Any] | None = None) -> Cluster:
    """The cluster that :func:`to_tree` wrote down, with these changes.

    Raises:
        UserError: unknown keys or bad values.
    """
    values: dict[str, Any] = {}
    _merge(values, {}, tree, "")
    _merge(values, {}, changes or {}, "")
    return _checked(values, {})


def to_tree(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain dictionaries, lists and scalars."""
    return asdict(cluster) | {"scheduler": str(cluster.scheduler)}


def names() -> dict[str, Path]:
    """Every profile that can be named, with the file it is read from."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _folders() -> list[Path]:
    given = [typed(text) for text in os.environ.get("TRACT_CLUSTERS", "").split(":") if text]
    for folder in given:
        if not folder.is_dir():
            raise UserError(f"expected folders of cluster profiles in TRACT_CLUSTERS, got {folder}; make or remove it.")
    return [*given, _OF_REPOSITORY, typed("~/.config/tract/clusters"), SHIPPED]


def _lineage(name: str) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a profile and of its bases, the profile first, each without its ``base``."""
    lineage: list[tuple[Path, dict[str, Any]]] = []
    wanted: str | None = name
    while wanted is not None:
        seen = [path for path, _ in lineage]
        path = _find(wanted, seen)
        content = _read(path)
        wanted = content.pop("base", None)
        if wanted is not None and not isinstance(wanted, str):
            raise UserError(f"expected base to be the name of a profile, got {wanted!r} in {path}.")
        lineage.append((path, content))
    return lineage


def _find(name: str, seen: list[Path]) -> Path:
    """The file of a profile; a file never inherits from itself, so one may refine its namesake."""
    behind = f" (the base of {seen[-1]})" if seen else ""
    if name.endswith(".yaml"):
        path = (seen[-1].parent if seen else Path.cwd()) / typed(name)
        if not path.is_file():
            raise UserError(f"expected a cluster profile, got {name}{behind}, which is no file.")
        if path in seen:
            raise UserError(f"expected profiles that end somewhere, got {name}{behind}, which is its own base.")
        return path
    for folder in _folders():
        path = folder / f"{name}.yaml"
        if path.is_file() and path not in seen:
            return path
    known = {key for key, path in names().items() if path not in seen}
    places = ", ".join(map(str, _folders()))
    raise UserError(f"unknown cluster profile {name!r}{behind}; {nearest(name, known)}; looked for in {places}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a cluster profile that can be read, got {path}: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"expected YAML in {path}{line}, got: {getattr(error, 'problem', error)}.") from None
    if not isinstance(content, dict | None):
        raise UserError(f"expected KEY: VALUE lines in {path}, got {type(content).__name__}.")
    return content or {}


def _merge(values: dict[str, Any], places: dict[str, str], content: dict[str, Any], place: str) -> None:
    """Add what one source says; later sources win, and ``extra`` is merged option by option."""
    for key, value in content.items():
        name, _, option = str(key).partition(".")
        if name not in _TYPES or (option and name != "extra"):
            raise UserError(f"unknown key cluster.{key}{place}; {nearest(str(key), _TYPES)}.")
        if option:
            value = {option: value}
        options = _TYPES[name]
        if not any(_KINDS[option][1](value) for option in options):
            words = " or ".join(_KINDS[option][0] for option in options)
            cure = "; put quotes round it" if options[0] == "str" and isinstance(value, int | float) else ""
            raise UserError(f"expected cluster.{name} to be {words}, got {value!r}{place}{cure}.")
        values[name] = {**values.get(name, {}), **value} if name == "extra" else value
        places[name] = place


def _checked(values: dict[str, Any], places: dict[str, str]) -> Cluster:
    values = dict(values)
    values["extra"] = {key: value for key, value in values.get("extra", {}).items() if value is not None}
    values["scheduler"] = Scheduler(values.get("scheduler", Scheduler.slurm))
    values |= {key: float(value) for key, value in values.items() if type(value) is int and "float" in _TYPES[key]}
    cluster = Cluster(**values)
    for key, good, expected in [*_ranges(cluster), *_words(cluster)]:
        if not good:
            place = places.get(key, "")
            raise UserError(f"expected cluster.{key} to be {expected}, got {getattr(cluster, key)!r}{place}.")
    _check_together(cluster)
    for option, value in cluster.extra.items():
        _check_extra(option, value, places.get("extra", ""))
    return cluster


def _ranges(c: Cluster) -> list[tuple[str, bool, str]]:
    ones = ("timeout_minutes", "cpus_per_task", "cpus_without_gpu", "parallel", "runs_per_gpu", "max_fruitless")
    optional = ("nodes", "tasks_per_node", "max_array_size", "gpus_per_job")
    zeros = ("gpus_per_node", "stage_keep_hours", "max_requeues", "free_gib")
    limit = min(60 * c.timeout_minutes - 1, 65535)  # 65535: the most that sbatch takes
    return [
        *((key, getattr(c, key) >= 1, "at least 1") for key in ones),
        *((key, getattr(c, key) is None or getattr(c, key) >= 1, "at least 1 or null") for key in optional),
        *((key, getattr(c, key) >= 0, "0 or more") for key in zeros),
        ("memory_gb", c.memory_gb is None or c.memory_gb > 0, "above 0 or null"),
        ("signal_seconds", 1 <= c.signal_seconds <= limit, f"1 to {limit} (below the time limit)"),
    ]


def _words(c: Cluster) -> list[tuple[str, bool, str]]:
    """Names are one word each; an empty word is not the same as null."""
    single = ("partition", "account", "qos", "constraint", "exclude", "reservation")
    given = {key: value for key, value in asdict(c).items() if isinstance(value, str) and key != "container"}
    return [
        *((key, value.split() == [value], "one word or null") for key, value in given.items() if key in single),
        *((key, value.strip() != "", "a word or null") for key, value in given.items()),
    ]


def _check_together(c: Cluster) -> None:
    if c.runs_per_gpu > 1 and (c.nodes or 1) > 1:
        raise UserError(
            f"expected cluster.nodes to be 1 or null where cluster.runs_per_gpu is {c.runs_per_gpu}, got {c.nodes}; "
            "runs that share a GPU stay on one node."
        )
    if (c.gpus_per_job or 1) > max(1, c.gpus_per_node):
        raise UserError(
            f"expected cluster.gpus_per_job to be at most cluster.gpus_per_node={c.gpus_per_node}, got "
            f"{c.gpus_per_job}; a job that packs runs stays on one node."
        )
    if c.stage_from is not None and c.stage_to is None:
        raise UserError("expected cluster.stage_to beside cluster.stage_from, got null; name a disk of the node.")


def _check_extra(option: str, value: Any, place: str) -> None:
    name = option.replace("_", "-")
    if name.startswith("-") or name.split() != [name]:
        raise UserError(f"expected options without dashes and spaces in cluster.extra{place}, got {option!r}.")
    if name in _FIELD_OF_OPTION:
        raise UserError(f"expected cluster.{_FIELD_OF_OPTION[name]}, got the option {option} in cluster.extra{place}.")
    if name in _OPTIONS_OF_LAUNCHER:
        raise UserError(f"the option {option} in cluster.extra{place} is set by --submit itself; remove it.")
    if value is False or not isinstance(value, str | int | float):
        raise UserError(f"expected cluster.extra.{option} to be a word, a number or true, got {value!r}{place}.")
