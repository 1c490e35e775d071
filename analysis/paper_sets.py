"""The sets of runs that the paper's tables and figures are made from: ``paper.yaml`` and ``paper_figures.yaml``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from analysis.load import Run
from analysis.paper_runs import Cohort, Members, cohorts, members_of
from runfolder.folder import RunFolder

_HERE = Path(__file__).parent


@functools.cache
def table_layout() -> dict[str, Any]:
    """The content of ``paper.yaml``."""
    return yaml.safe_load((_HERE / "paper.yaml").read_text(encoding="utf-8"))


@functools.cache
def figure_layout() -> dict[str, Any]:
    """The content of ``paper_figures.yaml``."""
    return yaml.safe_load((_HERE / "paper_figures.yaml").read_text(encoding="utf-8"))


def set_of(name: str) -> dict[str, Any]:
    """A set of runs of either file with all its values."""
    own = figure_layout()["sets"].get(name)
    if own is None:
        return table_layout()["sets"][name]
    return (set_of(own["like"]) if "like" in own else {}) | own


def members_of_set(
    spec: dict[str, Any], runs: Sequence[Run], named: list[str], chosen: Sequence[Cohort] | None = None
) -> dict[Cohort, Members]:
    """The runs of each cohort of a set; those that are other sets' alone are left out in silence.

    Args:
        spec: the set.
        runs: all runs of its experiment.
        named: gets a sentence for everything else that is left out.
        chosen: only these cohorts of the set; runs of its others are left out in silence too.
    """
    wanted = cohorts(spec) if chosen is None else list(chosen)
    names = [*table_layout()["sets"], *figure_layout()["sets"]]
    others = [own for own in [*map(set_of, names), spec] if own["experiment"] == spec["experiment"]]
    elsewhere = {folder for own in others for folder in _folders(cohorts(own), runs)} - _folders(wanted, runs)
    return members_of(wanted, [run for run in runs if run.folder not in elsewhere], named)


def _folders(found: Sequence[Cohort], runs: Sequence[Run]) -> set[RunFolder]:
    return {run.folder for own in members_of(found, runs, []).values() for run in own.runs}
