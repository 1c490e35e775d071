"""What the analysis scripts' command lines share: bad flags are one sentence too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from analysis.cache import Cache, default_folder
from analysis.load import InputError, nearest

EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`InputError`, with the nearest flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse a value."""
        raise InputError(f"{message}; --help shows the flags.")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """As ``parse_args``.

        Raises:
            InputError: an unknown flag or a bad value.
        """
        options, unknown = self.parse_known_args(arguments)
        for word in unknown:
            raise InputError(f"unknown flag {word}; nearest: {nearest(word, self._option_string_actions)}.")
        return options


def add_cache_flags(parser: Parser) -> None:
    """Add ``--cache DIR`` and ``--no-cache``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--cache", type=Path, metavar="DIR", help="where what was read is kept (default: ~/.cache/tract-analysis)"
    )
    group.add_argument("--no-cache", action="store_true", help="read everything anew and keep nothing")


def chosen_cache(options: argparse.Namespace) -> Cache | None:
    """The cache that the flags of :func:`add_cache_flags` ask for."""
    folder = None if options.no_cache else options.cache or default_folder()
    return folder and Cache(folder)


def exit_code(command: Callable[[], int]) -> int:
    """The command's exit code; bad input is one sentence and 2."""
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
