"""Errors that a person can act on: one sentence, no traceback."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """A command line whose errors are :class:`UserError`; flags are written out."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse a value."""
        raise UserError(f"{message}; --help shows the flags.")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The options; flags may stand between words.

        Raises:
            UserError: an unknown flag, with the nearest ones, or a bad value.
        """
        options, unknown = self.parse_known_intermixed_args(arguments)
        for word in unknown:
            raise UserError(f"unknown flag {word}; {nearest(word, self._option_string_actions)}.")
        return options
