"""Which runs belong into one cell of a table: rows by configuration, columns by method.

A configuration is flattened to ``{"model.name": "resnet18", "epochs": 10, ...}``. A setting
that differs between runs makes rows, so that no two configurations share a mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from runfolder import naming
from runfolder.records import is_number

ABSENT = "–"  # a setting that this configuration does not have
_NOT_SETTINGS = ("experiment", "seed", "runtime", "method")
# Columns that a CSV file has beside the settings.
_RESERVED = (
    "experiment",
    "metric",
    "epoch",
    "method",
    "n",
    "mean",
    "std",
    "seeds",
    "values",
    "runs",
    "baseline",
)
_RESERVED_BEGINNINGS = ("difference_", "speedup_")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key; lists become their JSON text, 1.0 is 1, infinity a word.

    Example:
        >>> flatten({"a": 1, "b": {"c": [2]}})
        {'a': 1, 'b.c': '[2]'}
    """
    return {key: _canonical(value) for key, value in naming.flatten(tree).items()}


def _canonical(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, default=str)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a result apart from seed and method, flattened.

    ``data.root`` is left out where it is only this machine's ``runtime.data_dir``.
    """
    flat = flatten({key: value for key, value in config.items() if key not in _NOT_SETTINGS})
    runtime = config.get("runtime")
    if isinstance(runtime, dict) and flat.get("data.root") == runtime.get("data_dir"):
        flat.pop("data.root", None)
    return flat


def varying_keys(flats: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values differ, without those that a component's name already decides; names first.

    Example:
        >>> varying_keys([{"model.name": "a", "model.depth": 1}, {"model.name": "b", "model.depth": 2}])
        ['model.name']
    """
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    varying = [key for key in keys if len(_distinct(flats, [key])) > 1]
    shown = [key for key in varying if not _decided_by_name(key, varying, flats)]
    return sorted(shown, key=lambda key: not key.endswith(".name"))


def _decided_by_name(key: str, varying: list[str], flats: Sequence[dict[str, Any]]) -> bool:
    name = f"{key.partition('.')[0]}.name"
    return key != name and name in varying and len(_distinct(flats, [name])) == len(_distinct(flats, [name, key]))


def _distinct(flats: Sequence[dict[str, Any]], keys: list[str]) -> set[str]:
    return {json.dumps([flat.get(key, ABSENT) for key in keys]) for flat in flats}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest unique readable name of each dotted key.

    Example:
        >>> short_names(["model.name", "optim.lr", "epochs"])
        {'model.name': 'model', 'optim.lr': 'lr', 'epochs': 'epochs'}
    """
    candidates = {key: _candidates(key) for key in keys}
    names = {}
    for key, own in candidates.items():
        others = {name for other in keys if other != key for name in candidates[other]}
        whole = f"config.{key}" if _reserved(key) else key
        names[key] = next((name for name in own if name not in others and not _reserved(name)), whole)
    return names


def _reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith(_RESERVED_BEGINNINGS)


def _candidates(key: str) -> list[str]:
    parts = key.split(".")
    if parts[-1] == "name" and len(parts) > 1:
        return [".".join(parts[:-1]), key]
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def method_labels(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """A label per method node: its name, and the options in which its namesakes differ; a seed is the run's.

    Example:
        >>> method_labels([{"name": "tract", "lambda_": 0.1}, {"name": "tract", "lambda_": 0.2}, {"name": "vanilla"}])
        ['tract lambda_=0.1', 'tract lambda_=0.2', 'vanilla']
    """
    flats = [{key: v for key, v in flatten(node).items() if key.split(".")[-1] != "seed"} for node in nodes]
    labels = []
    for flat in flats:
        namesakes = [other for other in flats if other["name"] == flat["name"]]
        options = [f"{key}={plain(flat.get(key, ABSENT))}" for key in varying_keys(namesakes)]
        labels.append(" ".join([flat["name"], *options]))
    return labels


def plain(value: Any) -> str:
    """A setting as a person writes it: ``0.1``, ``true``, ``null``, ``resnet18``."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def natural_order(values: Iterable[Any]) -> tuple[tuple[int, float, str], ...]:
    """A sort key for settings of mixed types: numbers by size, then words."""
    return tuple((0, float(v), "") if is_number(v) else (1, 0.0, plain(v)) for v in values)
