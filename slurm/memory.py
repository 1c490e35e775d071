"""Whether the system has killed a process of this job for lack of memory."""

from __future__ import annotations

import re
from pathlib import Path


def oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of this control group were killed for lack of memory; 0 where that is not counted.

    Slurm limits a job's memory by control groups; the kernel counts its kills in
    ``memory.events`` (version 2) or ``memory.oom_control`` (version 1).
    """
    for line in _lines(proc):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            source = root / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            source = root / "memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        for entry in _lines(source):
            found = re.fullmatch(r"oom_kill (\d+)", entry)
            if found:
                return int(found[1])
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
