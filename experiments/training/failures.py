"""Why a run failed, as ``failure.json`` records it: a kind that a policy can be chosen by.

==============  ==============================================================================
out-of-memory   of the GPU or the host; it will happen again with the same settings
non-finite      a loss, weights or layer inputs that are not finite
data            the data set is missing, damaged or not as expected
disk            a run folder that cannot be written: full, read-only
node            the machine: a GPU that fails or is missing, a file system that fails, ranks
                that do not find each other
peer            another rank of this run went away; its own record says why
input           bad input of any other kind
code            everything else: an error in the program
killed          ended by a signal that nobody announced, such as SIGKILL (written by launchers)
no-progress     several attempts in a row wrote no new checkpoint (written by launchers)
requeues        the budget of requeues is used up (written by launchers)
==============  ==============================================================================
"""

from __future__ import annotations

import errno
import re
import socket
import time
import traceback
from pathlib import Path

import torch

from experiments.errors import TrainingFailedError, UserError
from experiments.training.files import read_json, write_json
from tract import NonFiniteError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_FAULTS = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|NCCL communicator was aborted"
    r"|Timed out waiting|Socket Timeout|recvValue|sendBytes|gloo.*(timed out|Connect)",
    re.I,
)
_NODE = re.compile(
    r"ECC error|uncorrectable|no CUDA-capable device|devices? (is|are) (busy|unavailable)|fallen off the bus"
    r"|CUDA driver|unspecified launch failure|CUDA error: unknown error|NVLink|hardware|NCCL.*system error"
    r"|CUDA error: (initialization|system)",
    re.I,
)
_LINES = 12  # of a traceback that are kept


def kind_of(error: BaseException) -> str:
    """The kind of failure that an exception is."""
    text = str(error)
    if isinstance(error, TrainingFailedError | NonFiniteError):
        return "non-finite"
    if isinstance(error, UserError):
        return error.kind
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(text):
        return "out-of-memory"
    if isinstance(error, OSError) and error.errno in (*_DISK, *_FAULTS):
        return "disk" if error.errno in _DISK else "node"
    if isinstance(error, RuntimeError | ConnectionError):
        if _NODE.search(text):
            return "node"
        if isinstance(error, torch.distributed.DistError) or _PEER.search(text):
            return "peer"
    return "code"


def record(folder: Path, kind: str, reason: str, lines: list[str] | None = None) -> None:
    """Write ``failure.json``."""
    content = {"kind": kind, "reason": reason, "host": socket.gethostname(), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(folder / "failure.json", content | ({"traceback": lines} if lines else {}))


def record_error(folder: Path, error: BaseException, first: bool = True) -> None:
    """Write ``failure.json`` for an exception; what another rank has said of itself stays.

    Of ranks that merely lost their peers only the first one writes, after giving them a moment.
    """
    kind, path = kind_of(error), folder / "failure.json"
    if kind == "peer":
        if not first:
            return
        end = time.monotonic() + 2.0
        while time.monotonic() < end and not path.exists():
            time.sleep(0.1)
    if read_json(path).get("kind", "peer") != "peer":
        return
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lines = None
    if kind not in ("non-finite", "data", "disk", "input"):
        text = "".join(traceback.format_exception(error))
        lines = text.rstrip().splitlines()[-_LINES:]
        reason = f"{type(error).__name__}: {reason}"
    record(folder, kind, reason, lines)
