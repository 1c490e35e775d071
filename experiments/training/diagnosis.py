"""Which kind of failure an exception is; the kinds are listed in ``failures.py``."""

from __future__ import annotations

import errno
import re
import time
import traceback
from pathlib import Path

import torch

from experiments.errors import TrainingFailedError, UserError
from experiments.training.failures import LINES, record
from experiments.training.files import read_json
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
        lines = text.rstrip().splitlines()[-LINES:]
        reason = f"{type(error).__name__}: {reason}"
    record(folder, kind, reason, lines)
