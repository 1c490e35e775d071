"""YAML of run folders, which many hands may write to: plain values, without aliases, and not too deep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_LONG = 8192  # characters; some 30,000 nested brackets are a segmentation fault in the fast loader


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses an alias: ten lines of them are 10^9 values, and a node may hold itself."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"an alias (*{event.anchor}) in line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """A value that stands twice is written twice."""
        return True


_FAST_LOADER = getattr(yaml, "CSafeLoader", _Loader)  # eight times as fast where libyaml is there


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, has aliases or is nested too deeply; says which, without the file's name.
    """
    text = path.read_text(encoding="utf-8")  # a UnicodeDecodeError is a ValueError
    plain = len(text) < _LONG and "*" not in text and "\\u" not in text  # the fast one refuses lone surrogates
    try:
        return yaml.load(text, _FAST_LOADER if plain else _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{problem or str(error).splitlines()[0]}{where}") from None


def write_yaml(content: Any) -> bytes:
    """A file's bytes, in the order of the content; ASCII, so that names which are not UTF-8 come back as they are."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False).encode("ascii")
