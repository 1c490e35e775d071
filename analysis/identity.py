"""Whether the parts of a run folder are parts of one run.

A run's folder ends in eight hex digits of its configuration; ``result.json`` repeats them, the
first event file holds the configuration (for TensorBoard's HParams page), and
``provenance.json`` the command of every attempt. A run whose method or seed was changed midway,
or a folder put together from two, shows where they disagree.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from analysis.events import DamagedRecordError, RecordReader
from analysis.grouping import plain

_HASH = re.compile(r"-([0-9a-f]{8})$")
_BEGIN = 8  # the configuration is among the first records of its file
_BLOCK = 2**16  # bytes to read for them
_SESSION = "_hparams_/session_start_info"
_OF_THE_MACHINE = ("runtime.", "data.root")
_NAMED = {"seed": "seed", "method": "method.name", "method.lambda_": "method.lambda_"}  # word of a command -> setting


def faults(
    folder: Path, config: dict[str, Any], result: dict[str, Any] | None, attempts: Sequence[dict], files: Iterable[Path]
) -> list[str]:
    """What shows that the folder is not of one run, in words.

    Args:
        folder: the run folder.
        config: content of its ``config.yaml``.
        result: content of its ``result.json``.
        attempts: those of its ``provenance.json``.
        files: its event files.
    """
    found = [_hash_fault(folder, result)]
    found += [_command_fault(folder, config, attempt) for attempt in attempts]
    found += [_events_fault(config, path) for path in files]
    return list(dict.fromkeys(fault for fault in found if fault is not None))


def _hash_fault(folder: Path, result: dict | None) -> str | None:
    """The configuration's hash is written by training in both places; it is not computed here."""
    own, said = _hash_in(folder.name), (result or {}).get("config_hash")
    if None in (own, said) or own == said:
        return None
    return f"parts of different configurations ({own} in the folder's name, {said} in result.json)"


def _hash_in(name: str) -> str | None:
    match = _HASH.search(name)
    return match[1] if match else None


def _command_fault(folder: Path, config: dict, attempt: dict) -> str | None:
    """A command that names another run, seed or method than the folder's."""
    command = str(attempt.get("command") or "")
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    resumed = [_hash_in(Path(after).name) for word, after in zip(words, words[1:], strict=False) if word == "--resume"]
    own = _hash_in(folder.name)
    other_run = own is not None and any(found not in (None, own) for found in resumed)
    flat = recorded(config)
    other_values = any(
        flat.get(_NAMED[key], value) != _read(value, flat.get(_NAMED[key]))
        for key, equals, value in (word.partition("=") for word in words)
        if equals and key in _NAMED and "," not in value
    )
    return f"an attempt of another run, method or seed (`{command}`)" if other_run or other_values else None


def _read(word: str, like: Any) -> Any:
    try:
        return float(word) if isinstance(like, float) else word
    except ValueError:
        return word


def _events_fault(config: dict, path: Path) -> str | None:
    begun, own = begun_with(path), recorded(config)
    differing = [key for key in begun if key in own and begun[key] != own[key]]
    wrong = sorted((key for key in differing if not key.startswith(_OF_THE_MACHINE)), key=_rank)
    if not wrong:
        return None
    words = ", ".join(f"{key}={plain(begun[key])} instead of {plain(own[key])}" for key in wrong[:4])
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return f"{path.name} was begun with {words}{more}"


def _rank(key: str) -> tuple[bool, str]:
    return key not in _NAMED.values(), key


def begun_with(path: Path) -> dict[str, Any]:
    """The configuration that an event file begins with, flat; {} where it holds none."""
    try:
        with open(path, "rb") as file:
            for _, data in islice(RecordReader(file, _BLOCK), _BEGIN):
                for value in Event.FromString(data).summary.value:
                    if value.tag == _SESSION:
                        return _values(HParamsPluginData.FromString(value.metadata.plugin_data.content))
    except (DamagedRecordError, DecodeError, TypeError, OSError):  # damage is named where all points are read
        pass
    return {}


def _values(content: HParamsPluginData) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in content.session_start_info.hparams.items()}


def recorded(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as an event file holds it: flat, numbers as float, what is neither number nor truth as text.

    Example:
        >>> recorded({"seed": 1, "optim": {"betas": [0.9], "_target_": "Adam", "nesterov": False}})
        {'seed': 1.0, 'optim.betas': '[0.9]', 'optim.nesterov': False}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= recorded(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[f"{prefix}{key}"] = float(value) if number else value if isinstance(value, bool) else str(value)
    return flat
