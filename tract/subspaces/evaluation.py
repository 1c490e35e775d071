"""What networks of a subspace are measured by, alone and together: functions of logits and features.

Logits have shape (n, classes), features (n, ...), targets (n,) with a class each. Several models are a sequence,
of which all pairs are taken; a single model gives 0. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def ensemble_accuracy(logits: Sequence[Tensor], targets: Tensor) -> float:
    """The share of samples where the largest sum of logits is right, in [0, 1]."""
    total = torch.stack([one.double() for one in logits]).sum(0)
    return (total.argmax(1) == targets).double().mean().item()


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 20) -> float:
    """sum_b |hits_b - confidence_b| / n, with sums over the samples of bin b = min(floor(bins p), bins - 1).

    p is the probability of the predicted class, its confidence (Guo et al., arXiv 1706.04599, equation 3).
    """
    return calibration_sums(logits, targets, bins).abs().sum().item() / len(targets)


def calibration_sums(logits: Tensor, targets: Tensor, bins: int = 20) -> Tensor:
    """hits_b - confidence_b of each bin, (bins,): parts of a set of samples add up."""
    confidence, predicted = F.softmax(logits.double(), dim=1).max(1)
    excess = (predicted == targets).double() - confidence
    place = (bins * confidence).long().clamp(max=bins - 1)
    return excess.new_zeros(bins).index_add(0, place, excess)


def total_variation(logits: Sequence[Tensor]) -> float:
    """The mean over pairs and samples of |p - q|_1 / 2, with p and q the models' probabilities."""
    probabilities = [F.softmax(one.double(), dim=1) for one in logits]
    return _over_pairs(probabilities, lambda p, q: 0.5 * (p - q).abs().sum(1))


def disagreement(logits: Sequence[Tensor]) -> float:
    """The share of samples for which two models predict different classes, a mean over pairs."""
    return _over_pairs([one.argmax(1) for one in logits], lambda p, q: (p != q).double())


def disagreement_where_one_is_right(logits: Sequence[Tensor], targets: Tensor) -> float:
    """The share of all samples where two models disagree and one of them is right, a mean over pairs."""
    predicted = [one.argmax(1) for one in logits]
    return _over_pairs(predicted, lambda p, q: ((p != q) & ((p == targets) | (q == targets))).double())


def feature_cosine(features: Sequence[Tensor], squared: bool) -> float:
    """The mean over pairs and samples of the cosine of two models' features, or of its square."""
    flat = [F.normalize(one.flatten(1).double(), dim=1) for one in features]
    return _over_pairs(flat, lambda p, q: (p * q).sum(1) ** (2 if squared else 1))


def _over_pairs(values: Sequence[Tensor], compare: Callable[[Tensor, Tensor], Tensor]) -> float:
    pairs = [compare(first, second).mean() for first, second in combinations(values, 2)]
    return torch.stack(pairs).mean().item() if pairs else 0.0
