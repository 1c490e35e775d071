"""TrAct: train the first layer of a vision model by its pre-activations (arXiv 2410.23970).

>>> import torch.nn as nn
>>> from tract import TrAct, apply_tract
>>> layer = TrAct(nn.Conv2d(3, 64, 3), lambda_=0.1)
"""

from tract.accumulation import accumulate
from tract.finite import NonFiniteError
from tract.layers import (
    DEFAULT_LAMBDA,
    TrAct,
    TrActConv1d,
    TrActConv2d,
    TrActConv3d,
    TrActLayer,
    TrActLinear,
)
from tract.surgery import apply_tract, unwrap

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_LAMBDA",
    "NonFiniteError",
    "TrAct",
    "TrActConv1d",
    "TrActConv2d",
    "TrActConv3d",
    "TrActLayer",
    "TrActLinear",
    "accumulate",
    "apply_tract",
    "unwrap",
]
