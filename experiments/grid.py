"""A grid file and command-line choices -> the full list of runs, in a fixed order. Pure.

A grid (``conf/grid/*.yaml``) names its experiment, may ``set`` values for all runs, may have a ``note`` for
whoever starts it, and lists axes; its runs are the product of the axes. An axis value is a plain value of the key
the axis is named after, or a mapping of several keys (then the axis's name is free).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import yaml

from experiments.config import CONF, Config, compose_config, run_name
from experiments.tuning import UntunedError
from runfolder.errors import UserError, nearest

Point = dict[str, Any]


def load_grid(name: str) -> dict[str, Any]:
    """The content of ``conf/grid/NAME.yaml``.

    Raises:
        UserError: no such grid.
    """
    path = CONF / "grid" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown grid {name!r}; {nearest(name, grids())}.")
    return yaml.safe_load(path.read_text())


def grids(experiment: str | None = None) -> list[str]:
    """Names of all grids, or of those of one experiment."""
    paths = sorted((CONF / "grid").glob("*.yaml"))
    return [p.stem for p in paths if experiment in (None, yaml.safe_load(p.read_text())["experiment"])]


def points(grid: dict[str, Any], choices: dict[str, list[Any]]) -> list[Point]:
    """The overrides of each run of a grid, after a person's choices.

    A choice of a key that is an axis replaces its values; of a key that axis values or
    ``set`` fix (such as ``method``) keeps the runs that have one of the values; any other
    choice is set for all runs, with several values as one more axis.

    Args:
        grid: the content of a grid file.
        choices: {key: values} from the command line.

    Raises:
        UserError: no run of the grid has a chosen value.
    """
    axes = [_axis(name, values) for name, values in grid.get("axes", {}).items()]
    fixed = grid.get("set", {})
    for key, values in choices.items():
        position = next((i for i, axis in enumerate(axes) if all(set(point) == {key} for point in axis)), None)
        if position is not None:
            axes[position] = _axis(key, values)
        elif not any(key in point for axis in axes for point in axis) and key not in fixed:
            axes.append(_axis(key, values))
    runs = [dict(fixed) | _merged(parts) for parts in itertools.product(*axes)]
    for key, values in choices.items():
        present = _distinct(run[key] for run in runs if key in run)
        runs = [run for run in runs if key not in run or run[key] in values]
        if not runs or not any(key in run for run in runs):
            raise UserError(f"no run of the grid has {key}={_words(values)}; it has {_words(present)}.")
        # Where some arms have the key and others do not (method.lambda_), those that have it are meant.
        runs = [run for run in runs if key in run]
    return runs


def plan(experiment: str, grid_name: str, choices: dict[str, list[Any]]) -> list[Config]:
    """All runs of a grid, composed and validated, before any is started.

    Raises:
        UserError: a bad grid or choice; no two runs may be the same.
        UntunedError: runs that decide on values of these are missing; all of them.
    """
    grid = load_grid(grid_name)
    if grid["experiment"] != experiment:
        raise UserError(
            f"grid={grid_name} belongs to {grid['experiment']}; {experiment} has {_words(grids(experiment))}."
        )
    configs, missing = [], []
    for point in points(grid, choices):
        try:
            configs.append(compose_config(experiment, point))
        except UntunedError as error:
            missing += error.folders
    if missing:
        raise UntunedError(missing)
    names = [run_name(config) for config in configs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"expected different runs, got {twice} twice; remove the repeated value.")
    return configs


def _axis(name: str, values: list[Any]) -> list[Point]:
    return [value if isinstance(value, dict) else {name: value} for value in values]


def _merged(parts: tuple[Point, ...]) -> Point:
    return {key: value for part in parts for key, value in part.items()}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """In the order of their first appearance; values may be lists."""
    kept: list[Any] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def _words(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values) or "none"
