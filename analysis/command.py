"""What the analysis scripts' command lines share: bad flags are one sentence too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from analysis.cache import Cache, default_folder
from runfolder.errors import EXIT_BAD_INPUT, UserError, nearest
from runfolder.folder import typed
from runfolder.printing import print_any_name, printable, reader_has_left


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`, with the nearest flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse a value."""
        raise UserError(f"{message}; --help shows the flags.")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """As ``parse_args``.

        Raises:
            UserError: an unknown flag or a bad value.
        """
        options, unknown = self.parse_known_args(arguments)
        for word in unknown:
            raise UserError(f"unknown flag {word}; {nearest(word, self._option_string_actions)}.")
        return options


def add_cache_flags(parser: Parser) -> None:
    """Add ``--cache DIR`` and ``--no-cache``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--cache", type=typed, metavar="DIR", help="where what was read is kept (default: ~/.cache/tract-analysis)"
    )
    group.add_argument("--no-cache", action="store_true", help="read everything anew and keep nothing")


def chosen_cache(options: argparse.Namespace) -> Cache | None:
    """The cache that the flags of :func:`add_cache_flags` ask for."""
    folder = None if options.no_cache else options.cache or default_folder()
    return folder and Cache(folder)


def exit_code(command: Callable[[], int]) -> int:
    r"""The command's exit code; bad input is one sentence and 2, as is output that cannot be written.

    A reader who has seen enough (``| head``) ends it quietly. What the output's encoding lacks is printed as
    an escape such as ``\u2013``.
    """
    print_any_name()
    try:
        code = command()
        print(end="", flush=True)
        return code
    except UserError as error:
        return _refused(str(error))
    except BrokenPipeError:
        return reader_has_left()
    except OSError as error:
        if error.filename is not None:  # of no file: it was the output
            raise
        return _refused(f"expected an output that can be written, got one that cannot ({error.strerror}); use --out.")


def _refused(sentence: str) -> int:
    print(f"error: {printable(sentence)}", file=sys.stderr)
    return EXIT_BAD_INPUT
