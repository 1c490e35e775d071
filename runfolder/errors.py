"""Errors that a person can act on: one sentence, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from runfolder.failures import FailureKind

EXIT_BAD_INPUT = 2
EXIT_BUSY = 69  # EX_UNAVAILABLE: another process trains this run
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: stopped with a checkpoint; the same command continues
EXIT_INTERRUPTED = 130  # a second Ctrl-C


class UserError(Exception):
    """Bad input: says what was expected, what came, and the cure. Exit code 2.

    Args:
        message: the sentence.
        kind: what is at fault, for the record of a run.
    """

    def __init__(self, message: str, kind: FailureKind = FailureKind.input):
        super().__init__(message, kind)

    def __str__(self) -> str:
        return self.args[0]

    @property
    def kind(self) -> FailureKind:
        """What is at fault."""
        return self.args[1]


class RunBusyError(Exception):
    """Another process is training this run. Exit code 69."""


class SupersededError(RunBusyError):
    """A newer process has taken this run: leave without writing anything."""


class TrainingFailedError(Exception):
    """Training cannot go on from here (for example a loss that is not finite). Exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known names closest to a word, as the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known[:8]
    return f"nearest: {', '.join(close)}" if close else "there are none"
