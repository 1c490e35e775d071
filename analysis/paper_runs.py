"""Which runs stand behind a cell of the paper's tables, and which commands make those that are missing.

A *cohort* is one subject (what is trained) with one arm (how): the runs that differ by seed
alone. A run is of a cohort if it is called the same (model, data, epochs, method, ...), and it
is the paper's run if it has also been trained by the paper's recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.comparison import Cell, cell_of
from analysis.content import read_config
from analysis.grouping import ABSENT, flatten, plain, settings
from analysis.load import Run
from runfolder.folder import RunFolder

# A choice on the command line, and the setting that it decides.
_SETTING = {
    "model": "model.name",
    "data": "data.name",
    "method": "method.name",
    "optim": "optim.name",
    "recipe.pretrain_epochs": "start.epochs",
}
_RECOMPRESSED = "imagefolder"
_STARTS = 2  # a transfer starts from a fine-tuning, which starts from a pre-training
_SHOWN = 8  # names in one sentence
# start_from names the seed, and what it leads to is compared itself; of the data their fingerprint is.
_CHANGES_NOTHING = ("start_from", "data.root", "data.in_memory", "eval_every", "eval_batch_size")


@dataclass(frozen=True, eq=False)
class Cohort:
    """One subject with one arm."""

    subject: str
    arm: str
    choices: dict[str, Any]  # on the command line
    identity: dict[str, Any]  # settings, flat
    recipe: dict[str, Any]  # settings, flat

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return f"{self.subject} / {self.arm}"


@dataclass
class Members:
    """The runs of one cohort."""

    runs: list[Run] = field(default_factory=list)  # by the paper's recipe, in any state
    settings: dict[RunFolder, dict[str, Any]] = field(default_factory=dict)  # of each folder, flat


def cohorts(spec: dict[str, Any]) -> list[Cohort]:
    """All cohorts of a set of ``paper.yaml`` that are ours to run, subject by subject."""
    return [
        _cohort(spec, subject, arm)
        for subject in spec["subjects"]
        for arm, choices in spec["arms"].items()
        if not choices.get("published_only")
    ]


def _cohort(spec: dict[str, Any], subject: str, arm: str) -> Cohort:
    choices = spec["subjects"][subject] | spec["arms"][arm]
    choices |= spec.get("arms_of", {}).get(subject, {}).get(arm, {})
    identity = {_SETTING.get(key, key): value for key, value in choices.items()} | spec.get("identity", {})
    recipe = spec["recipe"] | spec.get("recipe_of", {}).get(subject, {})
    for depth in range(1, _STARTS + 1):  # the same method in all phases
        prefix = "start." * depth
        if any(key.startswith(prefix) for key in recipe):
            recipe |= {f"{prefix}{key}": value for key, value in identity.items() if key.startswith("method.")}
    return Cohort(subject, arm, choices, flatten(identity), flatten(recipe))


def members_of(found: Sequence[Cohort], runs: Sequence[Run], named: list[str]) -> dict[Cohort, Members]:
    """Give each run to its cohort.

    Args:
        found: all cohorts of a set.
        runs: all runs of its experiment.
        named: gets a sentence for every run that might belong but is not the paper's, and all problems of the others.
    """
    members = {(cohort.subject, cohort.arm): Members() for cohort in found}
    silent: dict[tuple[str, ...], list[str]] = {}
    strange: dict[str, list[str]] = {}
    for run in runs:
        if run.config is None:
            named += [problem.text for problem in run.problems]
            continue
        flat = described(run.folder, run.config)
        alike = [cohort for cohort in found if not _differing(cohort.identity, flat, unknown_start=True, data=False)]
        fitting = [cohort for cohort in alike if not _differing(cohort.identity, flat, unknown_start=True)]
        fault = _fault(alike, fitting, flat)
        if fault is not None:
            named.append(f"{run.folder}: left out, {fault}.")
        elif fitting:
            named += [problem.text for problem in run.problems]
            own = members[fitting[0].subject, fitting[0].arm]
            own.runs.append(run)
            own.settings[run.folder] = flat
            unsaid = tuple(key for key in fitting[0].recipe if key not in flat and not key.startswith("start."))
            silent.setdefault(unsaid, []).append(str(run.folder))
        elif words := _strangeness(found, flat):
            strange.setdefault(words, []).append(str(run.folder))
    named += [_strange_sentence(words, folders) for words, folders in strange.items()]
    named += [_silent_sentence(unsaid, folders) for unsaid, folders in silent.items() if unsaid]
    return {cohort: members[cohort.subject, cohort.arm] for cohort in found}


def _strangeness(found: Sequence[Cohort], flat: dict[str, Any]) -> str:
    """What a run of no cohort is instead of the cohort that it is most like; nothing for another phase of its own."""
    differing = (_differing(cohort.identity, flat) for cohort in found)
    closest = min(differing, key=lambda keys: (len(keys), "method.name" in keys), default={})
    if "stage" in closest:
        return ""
    return _instead(closest, flat)


def _strange_sentence(words: str, folders: Sequence[str]) -> str:
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    return f"{folders[0]}{more}: left out, none of the paper's runs: {words}; --experiment shows it."


def _silent_sentence(unsaid: Sequence[str], folders: Sequence[str]) -> str:
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    return (
        f"{folders[0]}{more}: config.yaml does not say {', '.join(unsaid)}, which are taken to be the paper's; "
        "see that they were."
    )


def described(folder: RunFolder, config: dict[str, Any], starts: int = _STARTS) -> dict[str, Any]:
    """All settings that decide a run's result, flat; those of the run that it started from as ``start.KEY``.

    ``stage`` says whether it started from another run or network.
    """
    start_from = config.get("start_from")
    flat = settings(config) | flatten({"method": config["method"]})
    flat |= {"experiment": config.get("experiment"), "stage": "pretrain" if start_from is None else "finetune"}
    start = folder.start(start_from)
    before = None if start is None or starts == 0 else read_config(start)[0]
    if before is not None:
        flat |= {f"start.{key}": value for key, value in described(start, before, starts - 1).items()}
    return flat


def _differing(
    wanted: dict[str, Any], flat: dict[str, Any], unknown_start: bool = False, data: bool = True
) -> dict[str, Any]:
    """The wanted settings that a run has not; those of an unknown start, or the data set, may be let pass."""
    unknown_start = unknown_start and "start.method.name" not in flat
    return {
        key: value
        for key, value in wanted.items()
        if flat.get(key, ABSENT) != value
        and not (unknown_start and key.startswith("start."))
        and not (key == "data.name" and not data)
    }


def _fault(alike: Sequence[Cohort], fitting: Sequence[Cohort], flat: dict[str, Any]) -> str | None:
    """Why a run that is called like the paper's is not."""
    if alike and flat.get("data.name") == _RECOMPRESSED:
        return (
            "data=imagefolder is never the paper's data (its files may have been compressed again); train it with "
            "the data set itself"
        )
    if not fitting:
        return None
    (first, *_) = fitting
    known = {key: value for key, value in first.recipe.items() if key in flat or key.startswith("start.")}
    wrong = _differing(first.identity | known, flat)
    unread = next((prefix for prefix in map(_phase, wrong) if f"{prefix}method.name" not in flat), None)
    if unread is not None:
        origin = f"{unread.removesuffix('start.')}start_from"
        return (
            f"{origin}={plain(flat.get(origin, ABSENT))} is no run folder here, so what it was trained with before is "
            "unknown; put that folder back"
        )
    if not wrong:
        return None
    return f"not the recipe of {first.words}: {_instead(wrong, flat)}; train it with the paper's values"


def _instead(wrong: dict[str, Any], flat: dict[str, Any]) -> str:
    return ", ".join(f"{key}={plain(flat.get(key, ABSENT))} instead of {plain(value)}" for key, value in wrong.items())


def _phase(key: str) -> str:
    """``start.start.`` of ``start.start.epochs``."""
    return "start." * key.count("start.")


def mixed_settings(cohort: Cohort, members: Members) -> str | None:
    """A sentence where the usable runs of a cohort differ in what the paper's recipe leaves open."""
    flats = {run.folder: members.settings[run.folder] for run in members.runs if run.usable}
    keys = [key for key in dict.fromkeys(key for flat in flats.values() for key in flat) if _decides(key)]
    for key in keys:
        folders: dict[str, list[str]] = {}
        for folder, flat in flats.items():
            folders.setdefault(plain(flat.get(key, ABSENT)), []).append(str(folder))
        if len(folders) > 1:
            words = "; ".join(f"{value} in {', '.join(own)}" for value, own in folders.items())
            return f"{cohort.words}: its runs differ in {key} ({words}), so none is used; keep one kind under --runs."
    return None


def cells_of(
    members: dict[Cohort, Members], metrics: dict[str, str], named: list[str]
) -> dict[tuple[Cohort, str], Cell]:
    """The numbers of each cohort by quantity; empty cells where its runs are not of one kind.

    Args:
        members: the runs of each cohort.
        metrics: {quantity: TensorBoard tag}.
        named: gets a sentence for everything that is left out.
    """
    cells = {}
    for cohort, own in members.items():
        mixed = mixed_settings(cohort, own)
        named += [] if mixed is None else [mixed]
        for quantity, tag in metrics.items():
            cells[cohort, quantity] = cell_of(own.runs if mixed is None else [], tag, False, named)
    return cells


def _decides(key: str) -> bool:
    return not key.endswith(_CHANGES_NOTHING)


# -- what is missing ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """Runs that one command makes."""

    choices: dict[str, tuple]  # with the seeds
    subjects: tuple[str, ...]
    arms: tuple[str, ...]

    def count(self) -> int:
        """How many runs of the table's cells they are."""
        return len(self.subjects) * len(self.arms) * len(self.choices["seed"])


def missing(members: dict[Cohort, Members], seeds: int) -> list[Missing]:
    """What is to be run for every cohort to have as many seeds as the paper, in as few commands as products allow.

    A seed that has a folder is not missing: whatever is wrong with it is said for itself.
    """
    found = []
    for cohort, own in members.items():
        wanted = _missing_seeds({run.seed for run in own.runs}, seeds)
        if wanted:
            choices = {key: (value,) for key, value in cohort.choices.items()} | {"seed": wanted}
            found.append(Missing(choices, (cohort.subject,), (cohort.arm,)))
    for key in dict.fromkeys(key for item in found for key in item.choices if key != "seed"):
        found = _joined(found, key)
    return found


def _missing_seeds(present: set[int], seeds: int) -> tuple[int, ...]:
    free = [seed for seed in range(seeds + len(present)) if seed not in present]
    return tuple(free[: max(0, seeds - len(present))])


def _joined(items: Sequence[Missing], key: str) -> list[Missing]:
    """Unite what differs in the values of one key alone."""
    groups: dict[tuple, list[Missing]] = {}
    for item in items:
        rest = tuple((k, v) for k, v in item.choices.items() if k != key)
        groups.setdefault((key in item.choices, rest), []).append(item)
    return [group[0] if len(group) == 1 else _united(group, key) for group in groups.values()]


def _united(group: Sequence[Missing], key: str) -> Missing:
    values = tuple(dict.fromkeys(value for item in group for value in item.choices[key]))
    subjects = tuple(dict.fromkeys(subject for item in group for subject in item.subjects))
    arms = tuple(dict.fromkeys(arm for item in group for arm in item.arms))
    return Missing(group[0].choices | {key: values}, subjects, arms)


def missing_sentence(spec: dict[str, Any], item: Missing, names: dict[str, str]) -> str:
    """What is missing and the command that makes it."""
    subjects = "; ".join(item.subjects[:_SHOWN])
    if len(item.subjects) > _SHOWN:
        subjects += f" and {len(item.subjects) - _SHOWN} more"
    arms, count = ", ".join(names[arm] for arm in item.arms), item.count()
    runs = "1 run" if count == 1 else f"{count} runs"
    return f"missing: {runs} of {subjects} ({arms}); start: `{command(spec, item)}`."


def command(spec: dict[str, Any], item: Missing) -> str:
    """The command line that submits what is missing."""
    choices = dict(item.choices)
    whole = spec.get("whole")
    if whole is not None and set(choices[whole]) == {values[whole] for values in spec["subjects"].values()}:
        del choices[whole]
    grid = [f"grid={spec['grid']}"] if "grid" in spec else []
    words = [shlex.quote(f"{key}={','.join(map(plain, values))}") for key, values in choices.items()]
    return " ".join([f"python experiments/{spec['experiment']}.py --submit", *grid, *words])
