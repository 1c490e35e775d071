"""Reasons to stop early, noticed between steps only.

Signal handlers set a flag and nothing else; the loop reads it at a step boundary, saves a
checkpoint and leaves. A second Ctrl-C interrupts at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Why training should stop now, if it should.

    Args:
        deadline: seconds from now (the start of the run) by which the process must be gone.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, deadline: float | None, clock=time.monotonic):
        self._clock = clock
        self._end = None if deadline is None else clock() + deadline
        self._signal: str | None = None
        self._longest = 0.0  # seconds of the longest stretch between two questions
        self._save = 0.0  # seconds of the longest checkpoint
        self._asked: float | None = None  # not before the first step: what starts up is not repeated

    def notice(self, number: int, _frame=None) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def saved(self, seconds: float) -> None:
        """Tell how long a checkpoint took; the deadline leaves time for another."""
        self._save = max(self._save, seconds)
        self._asked = self._clock()

    def reason(self) -> str | None:
        """A few words on why to stop at this step boundary, or None.

        The deadline counts as reached when one more stretch as long as the longest so far
        and a checkpoint (half as long again, and one second) would go beyond it.
        """
        now = self._clock()
        if self._asked is not None:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        if self._signal:
            return f"signal {self._signal}"
        if self._end is not None and now + 1.5 * (self._longest + self._save) + 1.0 > self._end:
            return "deadline"
        return None


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Send signals to this request; the handlers from before come back afterwards."""
    before = {number: signal.signal(number, request.notice) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
