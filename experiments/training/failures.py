"""Why a run failed, as ``failure.json`` records it: a kind that a policy can be chosen by.

==============  ==============================================================================
out-of-memory   of the GPU or the host; it will happen again with the same settings
non-finite      a loss, weights or layer inputs that are not finite
data            the data set is missing, damaged or not as expected
disk            a run folder that cannot be written: full, read-only
node            the machine: a GPU that fails or is missing, a file system that fails
peer            another rank of this run went away or never came; its own record says why
input           bad input of any other kind
code            everything else: an error in the program
no-progress     several attempts in a row wrote no new checkpoint (written by launchers)
requeues        the budget of requeues is used up (written by launchers)
==============  ==============================================================================
"""

from __future__ import annotations

import time
from pathlib import Path

from experiments.training.files import write_json
from experiments.training.place import node_name

LINES = 12  # of a traceback that are kept


def record(folder: Path, kind: str, reason: str, lines: list[str] | None = None) -> None:
    """Write ``failure.json``."""
    content = {"kind": kind, "reason": reason, "host": node_name(), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(folder / "failure.json", content | ({"traceback": lines} if lines else {}))
