"""Learning Neural Network Subspaces (Wortsman et al., arXiv 2102.10472): lines, curves and simplexes of networks.

>>> import torch.nn as nn
>>> from tract.subspaces import Line, apply_subspace, plain_at, set_coefficients
>>> model, other = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
>>> path = Line()
>>> print(*apply_subspace(model, path, [other]))
2 layers with 2 endpoints each: Line().
>>> set_coefficients(model, path.coefficients(0.3))
>>> sorted(plain_at(model, 0.3).state_dict())
['0.bias', '0.weight', '2.bias', '2.weight']
"""

from tract.subspaces.averaging import average, endpoint_weights, random_average, swag_sample
from tract.subspaces.layers import (
    SubspaceLayer,
    apply_subspace,
    load_endpoint,
    plain_at,
    plain_with,
    set_coefficients,
    set_coefficients_layerwise,
    subspace_layers,
)
from tract.subspaces.norm import reestimated
from tract.subspaces.paths import Curve, Line, Path, Simplex, path_of
from tract.subspaces.regulariser import absolute_cosine, distance, squared_cosine, statistics

__all__ = [
    "Curve",
    "Line",
    "Path",
    "Simplex",
    "SubspaceLayer",
    "absolute_cosine",
    "apply_subspace",
    "average",
    "distance",
    "endpoint_weights",
    "load_endpoint",
    "path_of",
    "plain_at",
    "plain_with",
    "random_average",
    "reestimated",
    "set_coefficients",
    "set_coefficients_layerwise",
    "squared_cosine",
    "statistics",
    "subspace_layers",
    "swag_sample",
]
