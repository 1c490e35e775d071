"""Reasons to save, to stop early or to give up, noticed between steps only.

Signal handlers set a flag and nothing else; the loop reads it at a step boundary. What
signals mean:

- USR2 (a batch system gives notice): save a checkpoint and leave.
- SIGTERM: the same outside a batch system. Inside one it can be the beginning of a requeue,
  of a preemption or of a cancellation, and leaving early would be taken for the run's end:
  ``on_term="save"`` saves a checkpoint and goes on until the process is killed.
- SIGHUP (the terminal is gone): as SIGTERM, and nothing more is printed. Where it is ignored, as under
  nohup, it stays so.
- SIGINT (Ctrl-C): save and leave; a second one interrupts at once.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_TERMS = (signal.SIGTERM, signal.SIGHUP)


class StoppedError(Exception):
    """Training stopped at a safe point and can be continued; the message says why."""


class Wish(IntEnum):
    """What to do at a step boundary; of several ranks' wishes the highest counts."""

    GO_ON = 0
    SAVE = 1  # write a checkpoint and go on
    STOP = 2  # write a checkpoint and leave
    ABANDON = 3  # leave without writing anything


class StopRequest:
    """What this process should do at the next step boundary, and why.

    Args:
        deadline: seconds from now (the start of the run) by which the process must be gone.
        clock: a monotonic clock in seconds.
        on_term: "stop" or "save": what SIGTERM means.
    """

    def __init__(self, deadline: float | None, clock=time.monotonic, on_term: str = "stop"):
        self._clock = clock
        self._end = None if deadline is None else clock() + deadline
        self._on_term = on_term
        self._signal: str | None = None
        self._save_asked = False
        self._lost: str | None = None
        self._longest = 0.0  # seconds of the longest stretch between two questions
        self._save = 0.0  # seconds of the longest checkpoint
        self._asked: float | None = None  # not before the first step: what starts up is not repeated
        self.why = ""

    def notice(self, number: int, _frame=None) -> None:
        """The signal handler."""
        if number == signal.SIGHUP:
            _print_no_more()
        if number in _TERMS and self._on_term == "save":
            self._save_asked = True
            return
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def abandon(self, reason: str) -> None:
        """Tell (from any thread) that the run belongs to another process now."""
        self._lost = reason

    def saved(self, seconds: float) -> None:
        """Tell how long a checkpoint took; the deadline leaves time for another."""
        self._save = max(self._save, seconds)
        self._asked = self._clock()

    def wish(self) -> Wish:
        """What to do at this step boundary; ``why`` says the reason in a few words.

        The deadline counts as reached when one more stretch as long as the longest so far
        and a checkpoint (half as long again, and one second) would go beyond it.
        """
        now = self._clock()
        if self._asked is not None:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        if self._lost:
            self.why = self._lost
            return Wish.ABANDON
        if self._signal:
            self.why = f"signal {self._signal}"
            return Wish.STOP
        if self._end is not None and now + 1.5 * (self._longest + self._save) + 1.0 > self._end:
            self.why = "deadline"
            return Wish.STOP
        if self._save_asked:
            self._save_asked = False
            self.why = "signal SIGTERM"
            return Wish.SAVE
        return Wish.GO_ON


def _print_no_more() -> None:
    """Writing to a terminal that is gone is an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Send signals to this request; the handlers from before come back afterwards."""
    hang_up = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
    before = {number: signal.signal(number, request.notice) for number in (*SIGNALS, *hang_up)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
