"""What the analysis scripts' command lines share: bad flags are one sentence too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from analysis.cache import Cache, default_folder
from runfolder.errors import EXIT_BAD_INPUT, Parser, UserError
from runfolder.folder import typed
from runfolder.printing import print_any_name, printable, reader_has_left

EXIT_NAMED = 1  # with --strict, where anything was named


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
