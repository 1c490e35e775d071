"""The run times of section 4.6 of the paper beside those that ``experiments/runtime.py --out FILE`` measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from analysis.content import read_json
from analysis.grouping import ABSENT, flatten, plain
from analysis.paper import BASELINE, RUNTIME, Key, PaperCell, PaperRow, PaperTable, published_number
from analysis.paper_sets import table_layout
from analysis.statistics import Summary
from runfolder.errors import UserError

_TITLE = "run time of a whole training with and without TrAct"
_KEYS = ((BASELINE, "seconds"), ("tract", "seconds"), ("tract", "overhead"))
_ORIGIN = ("sizes", "hardware", "packages")
_DIGITS = 2


def build_runtime_table(file: Path | None) -> PaperTable:
    """Section 4.6 as a table.

    A training's time is the median over the measured blocks of the seconds per step, times the
    steps of the whole training; the overhead is 100 (ratio of the medians - 1). Their
    quartiles are those of the blocks, and of the ratios of neighbouring blocks.

    Args:
        file: what ``experiments/runtime.py --out`` wrote; None where nothing was measured.

    Raises:
        UserError: not such a file.
    """
    content = {"settings": {}} if file is None else _read(file)
    named: list[str] = []
    rows = []
    for subject, spec in table_layout()[RUNTIME].items():
        blocks = _blocks(subject, spec, content, file, named)
        cells = [_cell(Key(subject, arm, quantity), blocks, spec["steps"]) for arm, quantity in _KEYS]
        rows.append(PaperRow((subject,), tuple(cells)))
    names = table_layout()["names"]
    columns = (names[BASELINE], names["tract"], f"{names['overhead']}, %")
    remarks = () if file is None else (_origin(content),)
    named += _missing([row.words[0] for row in rows if row.cells[0].ours.mean is None], file)
    return PaperTable(
        "section 4.6", _TITLE, ("training",), columns, tuple(rows), None, names, _DIGITS, remarks, tuple(named)
    )


def _read(file: Path) -> dict[str, Any]:
    content, _ = read_json(file)
    if content is not None and _is_whole(content):
        return content
    raise UserError(f"expected --runtime to be what experiments/runtime.py --out wrote, got {file}; measure it again.")


def _is_whole(content: dict) -> bool:
    """Whether all is a mapping that has to be one."""
    settings = content.get("settings")
    parts = [settings, *(content.get(key, {}) for key in _ORIGIN)]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(isinstance(own, dict) and isinstance(own.get("config", {}), dict) for own in settings.values())


def _blocks(subject: str, spec: dict, content: dict, file: Path | None, named: list[str]) -> np.ndarray | None:
    """Seconds per step, a row without and a row with TrAct; None where there are none to use."""
    measured = content["settings"].get(spec["setting"])
    if measured is None:
        return None
    flat = flatten(measured.get("config", {}))
    wrong = {key: value for key, value in flatten(spec["recipe"]).items() if flat.get(key, ABSENT) != value}
    if wrong:
        words = ", ".join(
            f"{key}={plain(flat.get(key, ABSENT))} instead of {plain(value)}" for key, value in wrong.items()
        )
        named.append(f"{file}: {subject} is left out, not the paper's recipe: {words}.")
        return None
    try:
        blocks = np.array([measured["vanilla"], measured["tract"]], dtype=float)
    except (KeyError, TypeError, ValueError):
        blocks = np.zeros(0)
    if blocks.ndim == 2 and blocks.size and np.isfinite(blocks).all() and (blocks > 0).all():
        return blocks
    raise UserError(
        f"expected seconds of as many blocks with as without TrAct of {spec['setting']} in {file}, got others."
    )


def _cell(key: Key, blocks: np.ndarray | None, steps: int) -> PaperCell:
    printed = published_number(RUNTIME, key)
    if blocks is None:
        return PaperCell(key, Summary(0, None, None), printed)
    vanilla, tract = blocks
    if key.quantity == "overhead":
        value, parts = np.median(tract) / np.median(vanilla) - 1, tract / vanilla - 1
        scale = 100
    else:
        parts, scale = (vanilla if key.arm == BASELINE else tract), steps
        value = np.median(parts)
    low, high = np.quantile(parts, [0.25, 0.75])
    return PaperCell(
        key,
        Summary(parts.size, float(scale * value), None),
        printed,
        quartiles=(float(scale * low), float(scale * high)),
    )


def _origin(content: dict) -> str:
    sizes, hardware, packages = (content.get(key, {}) for key in _ORIGIN)
    blocks, steps = sizes.get("blocks", "?"), sizes.get("steps", "?")
    return (
        f"Measured on {hardware.get('device', 'unknown hardware')}, {hardware.get('threads', '?')} CPU threads, torch "
        f"{packages.get('torch', 'unknown')}: {blocks} blocks of {steps} steps per method, training steps alone; the "
        "published times are of other hardware and include all else."
    )


def _missing(subjects: list[str], file: Path | None) -> list[str]:
    if not subjects:
        return []
    # the file holds one measurement of all
    settings = " ".join(spec["setting"] for spec in table_layout()[RUNTIME].values())
    out = "runtime.json" if file is None else str(file)
    return [
        f"missing: the run time of {'; '.join(subjects)}; measure it: `python experiments/runtime.py {settings} "
        f"--out {out}`, then give --runtime {out}."
    ]


def clock(seconds: float) -> str:
    """A run time as the paper prints it: seconds, or from ten hours on hours and minutes.

    Example:
        >>> clock(1091.2), clock(481920)
        ('1091 s', '133:52 h')
    """
    if seconds < 36_000:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(math.floor(seconds / 60 + 0.5), 60)
    return f"{hours}:{minutes:02d} h"
