r"""Text for a screen: whatever names and files hold, it does nothing but stand there."""

from __future__ import annotations

import io
import os
import re
import sys

EXIT_NO_READER = 141  # 128 + SIGPIPE, as a shell reports it of other programs
# What a terminal obeys, and what turns the direction of writing; surrogates stand for bytes that are not UTF-8.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, but: str = "") -> str:
    r"""A text in which control characters and bytes that are not UTF-8 are escapes; line breaks and tabs stay.

    Args:
        text: anything.
        but: control characters that stay too.

    Example:
        >>> printable("a\x1b[31mb\udce9\n")
        'a\\x1b[31mb\\udce9\n'
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


def print_any_name() -> None:
    """From now on print what the output's encoding lacks, and names that are not UTF-8, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def reader_has_left() -> int:
    """The exit code where whoever read the output has read enough (``| head``); nothing more is printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return EXIT_NO_READER
