"""What a run takes over from runs that were made to find it: its learning rate, and its steps from a budget in seconds.

A recipe asks for it by ``recipe.derived: experiments.tuning.derived`` and has ``rates`` and ``tuning_seeds``; its
tuning runs are this very run with ``stage=tune``, each of the rates and each of these seeds. What is taken over
becomes a plain value of the configuration, so a run stays a function of that alone.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig

from experiments import config
from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.files import read_json
from runfolder.folder import RunFolder
from runfolder.records import Result, read_result
from runfolder.tags import primary_metric, smaller_is_better

IMAGES, SECONDS = "images", "seconds"
_SHOWN = 6  # names in one sentence
_log = logging.getLogger(__name__)
_said: set[str] = set()
_folders: dict[str, dict[float, list[RunFolder]]] = {}  # what was composed, which takes longer than reading


class UntunedError(UserError):
    """Tuning runs that are not finished."""

    def __init__(self, folders: Iterable[RunFolder]):
        self.folders = list(dict.fromkeys(folders))
        names = ", ".join(folder.name for folder in self.folders[:_SHOWN])
        more = f" and {len(self.folders) - _SHOWN} more" if len(self.folders) > _SHOWN else ""
        super().__init__(
            f"expected finished tuning runs, got {len(self.folders)} that are not: {names}{more}; make them first, "
            "with the same choices and the grid that has stage=tune."
        )


def derived(experiment: str, overrides: dict[str, Any], tree: DictConfig) -> dict[str, Any]:
    """{key: value} that a run of ``recipe.stage`` and ``recipe.budget`` takes over.

    With the budget "images" a run has its epochs; with "seconds" as many steps as its method makes in
    ``recipe.seconds``: floor(seconds / s), s the seconds of training per step of the fastest of the tuning runs by
    images, since whatever else a machine does makes runs slower. With the stage "final" the rate is the one whose
    tuning runs by the same budget have the best mean primary metric on the images held out (then the lowest loss
    there; then the lowest rate); a run that failed as its numbers were not finite counts as the worst.

    Raises:
        UntunedError: tuning runs are missing.
        UserError: no such budget, or one without a step; no tuning run that has finished.
    """
    recipe, found = tree.recipe, {}
    if recipe.budget not in (IMAGES, SECONDS):
        raise UserError(f"expected recipe.budget to be {IMAGES} or {SECONDS}, got {recipe.budget!r}.")
    if recipe.budget == SECONDS:
        found |= _steps(_listed(tree, "seconds", "budgets", "data"), _results(experiment, overrides, tree, IMAGES))
    if recipe.stage == "final" and "optim.lr" not in overrides:
        results = _results(experiment, overrides, tree, recipe.budget)
        found["optim.lr"] = best_rate(results)
        choice = f"{tree.model.name}, {tree.method.name}, budget in {recipe.budget}: optim.lr={found['optim.lr']:g}"
        _say(f"{choice} ({_scores_in_words(results)})")
    return found


def _listed(tree: DictConfig, key: str, table: str, group: str) -> Any:
    """A value of the recipe, or the one that a table of it has for the component chosen."""
    value, choice = tree.recipe[key], tree[group].name
    if value is None and choice not in tree.recipe[table]:
        known = ", ".join(tree.recipe[table])
        raise UserError(f"this recipe has no recipe.{key} for {choice}, only for {known}; give recipe.{key}=VALUE.")
    return tree.recipe[table][choice] if value is None else value


def _say(sentence: str) -> None:
    """Once, however many seeds there are."""
    if sentence not in _said:
        _said.add(sentence)
        _log.info(sentence)


def best_rate(results: dict[float, list[Result | None]]) -> float:
    """The rate with the best mean on the images held out; None is a run that failed.

    Raises:
        UserError: none has finished with every seed.
    """
    scores = {rate: score for rate, own in results.items() if (score := _score(own)) is not None}
    if not scores:
        raise UserError(
            f"expected a rate that trains, got numbers that are not finite with all of {', '.join(map(str, results))}; "
            "tune with lower ones."
        )
    return min(scores, key=lambda rate: (*scores[rate], rate))


def _score(results: list[Result | None]) -> tuple[float, float] | None:
    """(metric, loss), means over seeds, the lower the better."""
    if None in results:
        return None
    tag = f"val/{primary_metric(*results).rpartition('/')[2]}"
    sign = 1 if smaller_is_better(tag) else -1
    metric, loss = (statistics.fmean(r["metrics"][name] for r in results) for name in (tag, "val/loss"))
    return sign * metric, loss


def _scores_in_words(results: dict[float, list[Result | None]]) -> str:
    scores = {rate: _score(own) for rate, own in results.items()}
    words = [f"{rate:g} {'failed' if score is None else f'{abs(score[0]):.2f}'}" for rate, score in scores.items()]
    return f"of {', '.join(words)}; held-out images, mean of {len(next(iter(results.values())))} seeds"


def _steps(seconds: float, results: dict[float, list[Result | None]]) -> dict[str, Any]:
    finished = [result for own in results.values() for result in own if result is not None]
    if not finished:
        raise UserError(
            "expected a tuning run that has finished, to know its seconds per step, got none; lower the rates."
        )
    per_step = min(result["train_seconds"] / result["steps"] for result in finished)
    steps = math.floor(seconds / per_step)
    if steps < 1:
        raise UserError(
            f"expected recipe.seconds to be enough for a step, got {seconds:g}, and a step takes {per_step:.3g} s."
        )
    per_epoch = finished[0]["steps"] / finished[0]["epochs"]  # at most what a run on more images has
    return {"max_steps": steps, "epochs": math.ceil(steps / per_epoch), "budget_seconds": float(seconds)}


def _results(
    experiment: str, overrides: dict[str, Any], tree: DictConfig, budget: str
) -> dict[float, list[Result | None]]:
    """By rate, the results of its tuning runs; None of one whose numbers were not finite."""
    recipe, found, missing = tree.recipe, {}, []
    rates, seeds = [float(rate) for rate in _listed(tree, "rates", "searched", "optim")], list(recipe.tuning_seeds)
    fixed = {key: value for key, value in overrides.items() if key not in ("seed", "stage", "optim.lr")}
    fixed |= {"stage": "tune", "recipe.budget": budget}
    key = repr((str(config.CONF), experiment, sorted((k, str(v)) for k, v in fixed.items()), rates, seeds))
    if key not in _folders:
        points = {rate: [fixed | {"optim.lr": rate, "seed": seed} for seed in seeds] for rate in rates}
        _folders[key] = {
            rate: [config.folder_of(config.compose_config(experiment, point)) for point in own]
            for rate, own in points.items()
        }
    for rate, folders in _folders[key].items():
        found[rate] = [read_result(folder) for folder in folders]
        lost = [folder for folder, result in zip(folders, found[rate], strict=True) if result is None]
        missing += [folder for folder in lost if not _is_hopeless(folder)]
    if missing:
        raise UntunedError(missing)
    return found


def _is_hopeless(folder: RunFolder) -> bool:
    return read_json(folder.failure).get("kind") == FailureKind.non_finite
