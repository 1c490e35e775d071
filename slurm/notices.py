"""What a supervisor is told by signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_OF_SLURM = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # not where they are ignored, as under nohup


class StoppedError(Exception):
    """Told to stop while nothing was running yet."""


class Notices:
    """Collects signals for whoever asks for them; a context manager."""

    def __init__(self):
        self._heard: list[signal.Signals] = []
        self._interrupts = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Notices:
        listened = [number for number in _OF_A_TERMINAL if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in (*_OF_SLURM, *listened)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[signal.Signals]:
        """What has been heard since the last time."""
        heard, self._heard = self._heard, []
        return heard

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Meanwhile USR2 is not waited for: it raises StoppedError, also if it came before."""
        self._interrupts = True
        try:
            if signal.SIGUSR2 in self._heard:
                raise StoppedError
            yield
        finally:
            self._interrupts = False

    def _hear(self, number: int, _frame: object) -> None:
        self._heard.append(signal.Signals(number))
        if self._interrupts and number == signal.SIGUSR2:
            self._interrupts = False
            raise StoppedError


def signal_name(number: int) -> str:
    """A signal in a word."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
