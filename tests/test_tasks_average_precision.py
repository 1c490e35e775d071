"""VOC's average precision, by its definition written out and by a library."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from torchmetrics.detection import MeanAveragePrecision

from experiments.tasks.average_precision import (
    RECALLS,
    ImageResult,
    average_precision,
    intersection_over_union,
    mean_average_precision,
)


def random_results(seed, conflicts):
    """Images with objects and detections near them; without ``conflicts`` objects lie apart and none is difficult."""
    draw, results = np.random.default_rng(seed), []
    for _ in range(6):
        n = int(draw.integers(0, 5))
        corners = draw.uniform(0, 40, (n, 2)) if conflicts else np.stack([100 * np.arange(n), np.zeros(n)], 1)
        truth = np.concatenate([corners, corners + draw.uniform(20, 40, (n, 2))], 1).reshape(-1, 4)
        labels = draw.integers(1, 4, n)
        owners = draw.integers(0, n, 2 * n) if n else np.empty(0, int)
        boxes = truth[owners] + draw.normal(0, 5, (len(owners), 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        guesses = np.where(draw.random(len(owners)) < 0.7, labels[owners], draw.integers(1, 4, len(owners)))
        difficult = draw.random(n) < 0.3 if conflicts else np.zeros(n, bool)
        results.append(
            ImageResult(boxes, guesses, draw.permutation(len(boxes)) + draw.random(), truth, labels, difficult)
        )
    return results


def literal(results, classes):
    """The development kit's evaluation, detection by detection, with Python's own arithmetic."""
    values = []
    for label in range(1, classes + 1):
        objects = [
            (image, list(box), bool(hard))
            for image, r in enumerate(results)
            for box, own, hard in zip(r.true_boxes, r.true_labels, r.difficult, strict=True)
            if own == label
        ]
        positives = sum(not hard for _, _, hard in objects)
        if positives == 0:
            continue
        found = [
            (-score, image, list(box))
            for image, r in enumerate(results)
            for box, own, score in zip(r.boxes, r.labels, r.scores, strict=True)
            if own == label
        ]
        taken, true, false, curve = set(), 0, 0, []
        for _, image, box in sorted(found, key=lambda entry: entry[0]):
            best, most = None, -1.0
            for number, (where, truth, _) in enumerate(objects):
                overlap = overlap_of(box, truth)
                if where == image and overlap > most:
                    best, most = number, overlap
            if most >= 0.5 and objects[best][2]:
                continue
            if most >= 0.5 and best not in taken:
                true += 1
                taken.add(best)
            else:
                false += 1
            curve.append((Fraction(true, positives), true / (true + false)))
        tenths = [Fraction(n, 10) for n in range(11)]
        values.append(sum(max([p for r, p in curve if r >= t], default=0.0) for t in tenths) / 11)
    return sum(values) / len(values) if values else float("nan")


def overlap_of(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("conflicts", [False, True])
def test_mean_average_precision_is_its_definition_written_out(seed, conflicts):
    results = random_results(seed, conflicts)
    assert mean_average_precision(results, 3) == pytest.approx(literal(results, 3), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(10))
def test_where_objects_lie_apart_and_none_is_difficult_it_is_cocos_at_eleven_recalls(seed):
    results = random_results(seed, conflicts=False)
    oracle = MeanAveragePrecision(iou_thresholds=[0.5], rec_thresholds=RECALLS.tolist())
    for r in results:
        found = {"boxes": r.boxes, "labels": r.labels, "scores": r.scores}
        truth = {"boxes": r.true_boxes, "labels": r.true_labels}
        oracle.update(*([{k: torch.from_numpy(np.asarray(v)) for k, v in part.items()}] for part in (found, truth)))
    assert mean_average_precision(results, 3) == pytest.approx(oracle.compute()["map"].item(), rel=1e-5)


@pytest.mark.parametrize("found", range(1, 11))
def test_a_recall_of_exactly_a_tenth_counts(found):
    assert average_precision(np.full(found, True), 10) == pytest.approx((found + 1) / 11)


def test_average_precision_by_hand():
    """Two objects, found first and third: precisions 1, 1/2 and 2/3 at the recalls 1/2, 1/2 and 1."""
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision(np.array([], bool), 2) == 0
    assert average_precision(np.array([True]), 1) == 1


def test_overlaps_are_torchvisions():
    boxes = [r.boxes for r in random_results(0, conflicts=True)] + [np.empty((0, 4))]
    for a in boxes:
        for b in boxes:
            expected = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
            np.testing.assert_allclose(intersection_over_union(a, b), expected, rtol=1e-12)
