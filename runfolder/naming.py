"""A run's name: readable words and a hash of the configuration.

A configuration is here the content of ``config.yaml``: nested dictionaries of plain values.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePath
from typing import Any

from runfolder.printing import printable

TARGET = "_target_"  # where a component's code lies; its name says which component it is
AND = "+"  # between the names of methods that a run has together
_HASH = re.compile(r"-([0-9a-f]{8})$")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key.

    Example:
        >>> flatten({"a": 1, "b": {"c": [2], "d": {}}})
        {'a': 1, 'b.c': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def hyper_parameters(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as TensorBoard's HParams takes it: flat, what is no number, text or truth value as text.

    Example:
        >>> hyper_parameters({"seed": 1, "optim": {"betas": [0.9], "_target_": "Adam", "nesterov": False}})
        {'seed': 1, 'optim.betas': '[0.9]', 'optim.nesterov': False}
    """
    shown = {key: value for key, value in flatten(tree).items() if not key.rpartition(".")[2].startswith("_")}
    return {key: value if isinstance(value, int | float) else printable(str(value)) for key, value in shown.items()}


def config_hash(tree: dict[str, Any]) -> str:
    """Eight hex digits of what decides a run's result: all but ``runtime``, and but for where code lies.

    Of a ``data.root`` in the machine's own ``runtime.data_dir`` only what is below that counts.
    """
    decisive = {key: _without_targets(value) for key, value in tree.items() if key != "runtime"}
    shared = in_data_dir(tree["data"].get("root"), tree["runtime"]["data_dir"])
    if shared == "":
        del decisive["data"]["root"]
    elif shared is not None:
        decisive["data"]["root"] = shared
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def _without_targets(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_targets(value) for key, value in node.items() if key != TARGET}


def in_data_dir(root: str | None, data_dir: str) -> str | None:
    """Where a data set's root lies in the machine's own folder of data sets ("": it is that folder); None outside."""
    if not isinstance(root, str) or not PurePath(root).is_relative_to(data_dir):
        return None
    below = str(PurePath(root).relative_to(data_dir))
    return "" if below == "." else below


def run_name(tree: dict[str, Any]) -> str:
    """The name of a run's folder."""
    methods = parts(tree["method"]) or {"": tree["method"]}
    method = AND.join(_name_and_numbers(node) for node in methods.values())
    words = [tree[group]["name"] for group in ("data", "model", "optim")]
    return "-".join([*words, f"{tree['epochs']}ep", method, f"s{tree['seed']}", config_hash(tree)])


def _name_and_numbers(node: dict[str, Any]) -> str:
    return node["name"] + "_".join(f"{value:g}" for value in node.values() if isinstance(value, float))


def parts(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of a component that are components themselves, as the methods of ``method=[a,b]`` are."""
    return {key: value for key, value in node.items() if isinstance(value, dict) and TARGET in value}


def hash_in(name: str) -> str | None:
    """The hash at the end of a run folder's name, if it has one."""
    match = _HASH.search(name)
    return match[1] if match else None
