"""Whether the parts of a run folder are parts of one run.

A run's folder ends in the hash of its configuration; ``result.json`` repeats it, the first event
file holds the configuration (for TensorBoard's HParams page), and ``provenance.json`` the command
of every attempt. A run whose method or seed was changed midway, or a folder put together from
two, shows where they disagree.
"""

from __future__ import annotations

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
from runfolder import naming
from runfolder.folder import RunFolder

_BEGIN = 8  # the configuration is among the first records of its file
_BLOCK = 2**16  # bytes to read for them
_SESSION = "_hparams_/session_start_info"
_OF_THE_MACHINE = ("runtime.", "data.root")
_NAMED = {"seed": "seed", "method": "method.name", "method.lambda_": "method.lambda_"}  # word of a command -> setting


def faults(
    folder: RunFolder,
    config: dict[str, Any],
    result: dict[str, Any] | None,
    attempts: Sequence[dict],
    files: Iterable[Path],
) -> list[str]:
    """What shows that the folder is not of one run, in words.

    Args:
        folder: the run folder.
        config: content of its ``config.yaml``.
        result: content of its ``result.json``.
        attempts: those of its ``provenance.json``.
        files: its event files.
    """
    known, said = naming.hash_in(folder.name), (result or {}).get("config_hash")
    found = [_command_fault(folder, config, attempt) for attempt in attempts]
    found += [_events_fault(config, path) for path in files]
    if None not in (known, said) and known != said:
        found.insert(
            0, f"parts of different configurations ({known} in the folder's name, {said} in {folder.result.name})"
        )
    named = list(dict.fromkeys(fault for fault in found if fault is not None))
    return named or _hash_faults(config, known or said)  # which cannot say what was changed


def _hash_faults(config: dict, known: str | None) -> list[str]:
    if known is None:
        return []
    try:
        own = naming.config_hash(config)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):  # training writes no such thing
        own = "none"
    if own == known:
        return []
    return [f"config.yaml is of another configuration than the run (its hash is {own}, the run's {known})"]


def _command_fault(folder: RunFolder, config: dict, attempt: dict) -> str | None:
    """A command that names another run, seed or method than the folder's."""
    command = str(attempt.get("command") or "")
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    resumed = [
        naming.hash_in(Path(after).name) for word, after in zip(words, words[1:], strict=False) if word == "--resume"
    ]
    own = naming.hash_in(folder.name)
    other_run = own is not None and any(found not in (None, own) for found in resumed)
    flat = recorded(config)
    other_values = any(
        flat.get(_NAMED[key], value) != _read(value.strip("[]"), flat.get(_NAMED[key]))
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


def recorded(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it is read from an event file: as TensorBoard takes it, every number as float.

    Example:
        >>> recorded({"seed": 1, "optim": {"betas": [0.9], "_target_": "Adam", "nesterov": False}})
        {'seed': 1.0, 'optim.betas': '[0.9]', 'optim.nesterov': False}
    """
    return {
        key: value if isinstance(value, str | bool) else float(value)
        for key, value in naming.hyper_parameters(tree).items()
    }
