"""Why a run failed, as ``failure.json`` records it: a kind that a policy can be chosen by."""

from __future__ import annotations

import errno
import time
from enum import StrEnum

from runfolder.files import write_atomically, write_json
from runfolder.folder import RunFolder
from runfolder.place import node_name

TRACEBACK_LINES = 12  # that are kept
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_ROOM = 8192  # bytes


class FailureKind(StrEnum):
    """A kind of failure: its word in ``failure.json``, and the cure that is offered for it."""

    def __new__(cls, word: str, cure: str) -> FailureKind:
        """A member from its word and its cure."""
        kind = str.__new__(cls, word)
        kind._value_, kind.cure = word, cure
        return kind

    # of the GPU or the host; it will happen again with the same settings
    out_of_memory = "out-of-memory", "take a larger GPU or a smaller micro_batch, then retry"
    # a loss, weights or layer inputs that are not finite
    non_finite = "non-finite", "lower optim.lr or set clip_grad_norm=1, which makes it another run"
    # the data set is missing, damaged or not as expected
    data = "data", "mend the data set that the reason names, then retry"
    # a run folder that cannot be written: full, read-only
    disk = "disk", "make room or permit writing, then retry"
    # a run folder that cannot be read from here, so that nothing is known of the run
    unreadable = "unreadable", "permit reading it (see its owner and mode), or leave it out with --experiment"
    # the machine: a GPU that fails or is missing, a file system that fails
    node = "node", "retry on another machine"
    # another rank of the run went away or never came; its own record says why
    peer = "peer", "see in the job's log why a rank went away, then retry"
    # bad input of any other kind
    input = "input", "correct the value that the reason names"
    # everything else: an error in the program
    code = "code", "correct the program where the traceback ends, then retry"
    # several attempts in a row wrote no new checkpoint
    no_progress = "no-progress", "ask for longer jobs or a smaller runtime.checkpoint_seconds, then retry"
    # the budget of requeues is used up
    requeues = "requeues", "retry, which gives a new budget"

    @property
    def may_pass_elsewhere(self) -> bool:
        """Whether another node may do what this one could not."""
        return self in (FailureKind.node, FailureKind.peer)

    @property
    def explains_itself(self) -> bool:
        """Whether the reason says everything, so that no traceback is kept."""
        return self in (FailureKind.non_finite, FailureKind.data, FailureKind.disk, FailureKind.input)


def cure_of(kind: str | None) -> str:
    """What to do about a kind of failure, also about one that is unknown here."""
    return FailureKind(kind).cure if kind in list(FailureKind) else "look into its log"


def record(folder: RunFolder, kind: FailureKind, reason: str, lines: list[str] | None = None) -> None:
    """Write ``failure.json``.

    Args:
        folder: the run folder.
        kind: what kind of failure it is.
        reason: one sentence.
        lines: the end of the traceback or of the output.
    """
    content: dict = {"kind": kind, "reason": reason, "host": node_name(), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
    content |= {"traceback": lines} if lines else {}
    try:
        write_json(folder.failure, content)
    except OSError as error:
        if error.errno not in DISK_ERRORS or not folder.room.exists():
            raise
        folder.room.unlink()
        write_json(folder.failure, content)


def keep_room(folder: RunFolder) -> None:
    """See that a full disk can still take ``failure.json``."""
    if not folder.room.exists():
        write_atomically(folder.room, bytes(_ROOM), durable=False)
