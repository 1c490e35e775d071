"""The folder of a run: where it is, its configuration and its result."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from experiments.config import Config, run_name, to_tree
from experiments.errors import UserError
from experiments.training.files import write_atomically


def folder_of(config: Config) -> Path:
    """Where this run lives: ``runs/<experiment>/<readable name>-<hash>``."""
    return Path(config.runtime.runs) / config.experiment / run_name(config)


def prepare_folder(config: Config) -> Path:
    """Make the run folder; write its ``config.yaml``, with this start's ``runtime``.

    Not for a run that another process is training.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder_of(config)
    text = yaml.safe_dump(to_tree(config), sort_keys=False).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        if not path.exists() or path.read_bytes() != text:
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"expected a folder that can be written, got {folder}: {error.strerror}.", "disk") from None
    return folder


def result_of(folder: Path) -> dict | None:
    """The content of ``result.json``: it exists when the run is finished.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise UserError(
            f"expected the result of a run in {path}, got something else; delete this file and start the run again, "
            "which writes it from the last checkpoint."
        )
    return result
