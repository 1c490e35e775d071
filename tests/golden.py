"""Check our implementation against numbers that a method's original code computed.

    python tests/golden.py METHOD DIR

METHOD is proxprop, subspaces or oialr. DIR holds manifest.json and the files that it names. Each case that disagrees
gets a line; a kind of case that is not known here disagrees. Exit code 1 if any case does, 2 for wrong words.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

METHODS = ("proxprop", "subspaces", "oialr")
Check = Callable[[dict, Path], list[str]]


def main(arguments: list[str]) -> int:
    """Print what disagrees and how many agree; returns the exit code."""
    if len(arguments) != 2 or arguments[0] not in METHODS:
        print(f"expected METHOD ({', '.join(METHODS)}) and DIR, got: {' '.join(arguments) or 'nothing'}.\n{__doc__}")
        return 2
    method, folder = arguments[0], Path(arguments[1])
    try:
        cases = json.loads((folder / "manifest.json").read_text())["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"expected {folder / 'manifest.json'} with a list of cases, got: {error}.")
        return 2
    check: Check = importlib.import_module(f"tests.golden_{method}").check
    agreeing = 0
    for case in cases:
        faults = faults_of(check, case, folder)
        agreeing += not faults
        if faults:
            print(f"{case.get('name')}: {'; '.join(faults)}")
    print(f"{agreeing} of {len(cases)} cases agree")
    return int(agreeing < len(cases))


def faults_of(check: Check, case: dict, folder: Path) -> list[str]:
    """What disagrees; a case that cannot be read or computed disagrees."""
    try:
        return check(case, folder)
    except Exception as error:  # the other cases are still to be checked
        return [f"{type(error).__name__}: {error}"]


def arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|; infinite where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    largest = (actual.detach().double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return largest / scale if scale else largest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
