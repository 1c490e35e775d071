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
    pid = process.get("pid")
    if not isinstance(pid, int):
        return None
    since = began(pid)
    return is_gone(pid) if not since else since != process.get("began")


def is_gone(pid: int) -> bool | None:
    """Whether no living process has this number; None where it may not be seen (hidepid, another user's)."""
    status = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if status:
        return status[0] in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return None


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
