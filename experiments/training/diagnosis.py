"""Which kind of failure an exception is, and its record in the run folder."""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from experiments.training.held import HeldFolder
from experiments.training.stop import StoppedError
from runfolder.errors import RunBusyError, TrainingFailedError, UserError
from runfolder.failures import DISK_ERRORS, TRACEBACK_LINES, FailureKind, record
from runfolder.files import read_json
from runfolder.folder import RunFolder
from runfolder.place import place_of_this_rank
from tract import NonFiniteError

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


def kind_of(error: BaseException) -> FailureKind:
    """The kind of failure that an exception is."""
    text = str(error)
    if isinstance(error, TrainingFailedError | NonFiniteError):
        return FailureKind.non_finite
    if isinstance(error, UserError):
        return error.kind
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(text):
        return FailureKind.out_of_memory
    if isinstance(error, OSError) and error.errno in (*DISK_ERRORS, *_FAULTS):
        return FailureKind.disk if error.errno in DISK_ERRORS else FailureKind.node
    if isinstance(error, RuntimeError | ConnectionError):
        if _NODE.search(text):
            return FailureKind.node
        if isinstance(error, torch.distributed.DistError) or _PEER.search(text):
            return FailureKind.peer
    return FailureKind.code


@contextmanager
def failure_recorded(held: HeldFolder) -> Iterator[None]:
    """Errors end in ``failure.json``, which says why the run failed until it is started again.

    Args:
        held: the run folder; nothing is written into one that another process has.
    """
    try:
        yield
    except (StoppedError, RunBusyError):
        raise
    except Exception as error:
        if held.folder.path.is_dir() and held.may_write():
            with suppress(OSError):
                record_error(held.folder, error, first=place_of_this_rank()[0] == 0)
        if isinstance(error, NonFiniteError):
            raise TrainingFailedError(str(error)) from error
        raise


def record_error(folder: RunFolder, error: BaseException, first: bool = True) -> None:
    """Write ``failure.json`` for an exception; what another rank has said of itself stays.

    Of ranks that merely lost their peers only the first one writes, after giving them a moment.
    """
    kind = kind_of(error)
    if kind == FailureKind.peer:
        if not first:
            return
        end = time.monotonic() + 2.0
        while time.monotonic() < end and not folder.failure.exists():
            time.sleep(0.1)
    if read_json(folder.failure).get("kind", FailureKind.peer) != FailureKind.peer:
        return
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if kind.explains_itself:
        record(folder, kind, reason)
        return
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()[-TRACEBACK_LINES:]
    record(folder, kind, f"{type(error).__name__}: {reason}", lines)
