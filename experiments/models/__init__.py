"""Networks by name: ``build_model("resnet18", num_classes=100)``.

A network is a function in this package that takes ``num_classes`` (and ``in_channels`` and
``image_size`` where they may vary) and a file ``conf/model/NAME.yaml`` with its options.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn
import yaml
from hydra.utils import get_object

from runfolder.errors import UserError, nearest

_CONF = Path(__file__).parents[1] / "conf" / "model"


def build_model(name: str, num_classes: int, **options) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: a file of ``conf/model/``.
        num_classes: width of the output.
        **options: keywords of the network's function, instead of those in its file.

    Raises:
        UserError: no such network, or no such option.
    """
    path = _CONF / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown network {name!r}; {nearest(name, (file.stem for file in _CONF.glob('*.yaml')))}.")
    node = yaml.safe_load(path.read_text())
    known = {key: value for key, value in node.items() if key not in ("name", "_target_")}
    return get_object(node["_target_"])(num_classes=num_classes, **(known | options))
