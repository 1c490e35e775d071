"""What a run's YAML and JSON files hold, or what is wrong with them: people edit them, and disks lose them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runfolder.folder import RunFolder
from runfolder.plain_yaml import read_yaml

Content = dict[str, Any]
_MOST_EPOCHS = 10**6  # of a configuration; each is counted when gaps are looked for
_UNREADABLE = "cannot be read"
_TOO_LARGE = f"has a whole number beyond {sys.float_info.max:.1e}"


def read_config(folder: RunFolder) -> tuple[Content, None] | tuple[None, str]:
    """(content of a run's ``config.yaml``, None), or (None, what is wrong with it)."""
    try:
        config = read_yaml(folder.config)
        fault = _config_fault(config)
    except FileNotFoundError:
        return None, "is missing"
    except ValueError as error:
        return None, f"{_UNREADABLE}: {error}"
    except OSError:
        return None, _UNREADABLE
    return (config, None) if fault is None else (None, fault)


def _config_fault(config: Any) -> str | None:
    if not isinstance(config, dict):
        return "is not a mapping"
    if _beyond_floats(config):
        return _TOO_LARGE
    for key, least in (("seed", 0), ("epochs", 1), ("eval_every", 1)):
        value = config.get(key, 1 if key == "eval_every" else None)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"has no whole number of at least {least} as {key}"
    if config["epochs"] > _MOST_EPOCHS:
        return f"has more than {_MOST_EPOCHS} as epochs"
    method = config.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        return "names no method"
    return None


def read_json(file: Path) -> tuple[Content | None, None] | tuple[None, str]:
    """(the mapping in a JSON file, or None where there is no file; None), or (None, what is wrong with it)."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if _beyond_floats(content):
            return None, _TOO_LARGE
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError):
        return None, _UNREADABLE
    return (content, None) if isinstance(content, dict) else (None, _UNREADABLE)


def _beyond_floats(tree: Any) -> bool:
    """Whether what a file holds has a whole number that is too large for a float.

    Raises:
        RecursionError: it holds itself, as an anchor of YAML may, or is nested too deeply to be worked with.

    Example:
        >>> _beyond_floats({"lr": [0.1, 10**308]}), _beyond_floats({"lr": [0.1, 10**309]})
        (False, True)
    """
    if isinstance(tree, dict | list | tuple | set):
        return any(map(_beyond_floats, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, int) and abs(tree) > sys.float_info.max
