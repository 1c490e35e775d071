"""TensorBoard tags of a run, and what their x axis counts.

``train/*`` are means over the steps since the last point, at optimizer steps. All others are
written at an evaluation, at epochs counted from 1: ``test/*`` (and ``NAME/*`` of every other
predictor that a method evaluates), ``val/*`` and ``fit/*`` (the same on held-out and on training
images), ``time/*``, ``memory/*``, ``model/*`` and a method's own. Epoch 0 is before the first step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

TOP1 = "test/top1"
PRIMARY = TOP1  # the primary metric where no result names one
TRAIN, TEST = "train/", "test/"
LOSS, LEARNING_RATE = "train/loss", "train/lr"
EPOCH_SECONDS = "time/epoch_seconds"
TRAIN_SECONDS = "time/train_seconds"  # since the first step, without evaluations
IMAGES_PER_SECOND = "time/images_per_second"
PEAK_MIB = "memory/peak_mib"
TRAINABLE = "model/parameters_trainable"
AT_INFERENCE = "model/parameters_inference"  # of the network that is the result
STATE_BYTES = "model/state_bytes"  # what goes from step to step: weights, buffers, the optimizer's state


def is_test(tag: str) -> bool:
    """Whether a tag is a measure of the test set."""
    return tag.startswith(TEST)


def counts_steps(tag: str) -> bool:
    """Whether a tag's x axis counts optimizer steps; else it counts epochs."""
    return tag.startswith(TRAIN)


def axis(tag: str) -> str:
    """What a tag's x axis counts, as a word: step or epoch."""
    return "step" if counts_steps(tag) else "epoch"


def smaller_is_better(tag: str) -> bool:
    """Whether less of a measure is more: of losses, errors, times and memory."""
    return tag.endswith(("loss", "error", "ece", "seconds", "mib"))


def primary_metric(*results: Mapping[str, object] | None) -> str:
    """The tag that runs are known by, as most of their ``result.json`` name it.

    Args:
        results: contents of ``result.json``; None of a run without one.
    """
    named = Counter(tag for result in results if isinstance(tag := (result or {}).get("primary_metric"), str))
    return max(named, key=named.get, default=PRIMARY)
