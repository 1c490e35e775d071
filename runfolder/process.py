"""Which process this is, and whether another one still lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_process(pid: int | None = None) -> dict:
    """What tells this process (or ``pid``) from every other one, also after a reboot or in a container."""
    pid = os.getpid() if pid is None else pid
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": pid,
        "began": began(pid),
    }


def is_dead(process: dict) -> bool | None:
    """Whether a process is gone; None where that cannot be told from here."""
    here = this_process()
    if any(process.get(key) != here[key] for key in ("boot", "processes")) or process.get("host") != here["host"]:
        return None
    return began(process["pid"]) != process.get("began")


def began(pid: int) -> str:
    """The start time of a living process in clock ticks since boot, else ""."""
    text = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not text or text[0] in "ZX":
        return ""
    return text[19]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
