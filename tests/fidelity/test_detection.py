"""Faster R-CNN beside the code of simple-faster-rcnn-pytorch and py-faster-rcnn.

Their numbers are in detection.json, with how they were made.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from experiments.config import build, compose_config
from experiments.models import build_model
from experiments.tasks.detection import Detection
from experiments.training.loop import total_steps
from experiments.training.optim import build_optimizer

ORIGINALS = json.loads(Path(__file__).with_name("detection.json").read_text())
SIMPLE, CAFFE = ORIGINALS["simple_faster_rcnn"], ORIGINALS["py_faster_rcnn"]
SIZES = {"width": 8, "hidden": 32}
BOXES = [[30, 40, 210, 160], [250, 60, 330, 300], [300, 150, 480, 310], [5, 200, 60, 250]]  # of the scene below
LABELS = [1, 3, 2, 1]


class Every:
    """A sampler without chance: of too many, the first or the last remain. Masks of positives and of negatives."""

    def __init__(self, count, share, last):
        self.count, self.share, self.last = count, share, last

    def __call__(self, labels):
        return zip(*(self._masks(label) for label in labels), strict=True)

    def _masks(self, label):
        positive, negative = torch.where(label >= 1)[0], torch.where(label == 0)[0]
        positive = self._some(positive, int(self.count * self.share))
        negative = self._some(negative, self.count - len(positive))
        return tuple(torch.zeros(len(label), dtype=torch.bool).index_fill(0, own, True) for own in (positive, negative))

    def _some(self, places, most):
        return places[max(0, len(places) - most) :] if self.last else places[:most]


def scene():
    """330 x 495 pixels of coloured squares from 0 to 1, and four objects."""
    squares = np.random.RandomState(0).randint(0, 256, (3, 22, 33))
    image = torch.tensor(np.kron(squares, np.ones((1, 15, 15))) / 255, dtype=torch.float32)
    target = {"boxes": torch.tensor(BOXES).float(), "labels": torch.tensor(LABELS), "trained": torch.arange(4)}
    return image, target | {"difficult": torch.zeros(4, dtype=torch.bool)}


def its_names(model):
    """{our name: the original's}, in its order."""
    head = {"box_head.fc6": "classifier.0", "box_head.fc7": "classifier.2", "box_predictor.bbox_pred": "cls_loc",
            "box_predictor.cls_score": "score"}  # fmt: skip
    rpn = {"head.conv.0.0": "conv1", "head.cls_logits": "score", "head.bbox_pred": "loc"}
    found = {}
    for name, _ in model.named_parameters():
        part, _, rest = name.partition(".")
        layer, _, kind = rest.rpartition(".")
        prefix, table = {"backbone": ("extractor", {}), "rpn": ("rpn", rpn), "roi_heads": ("head", head)}[part]
        found[name] = f"{prefix}.{table.get(layer, layer)}.{kind}"
    return found


def rows_as_ours(its, value):
    """Of a layer that answers: scores by anchor become all backgrounds, then all objects; y, x become x, y."""
    if its.startswith("rpn.score"):
        return value.unflatten(0, (9, 2)).transpose(0, 1).flatten(0, 1)
    if its.startswith(("rpn.loc", "head.cls_loc")):
        return value.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
    return value


def fill(model):
    """The weights that the original got: of each parameter its own numbers."""
    order = {name: number for number, name in enumerate(SIMPLE["parameters"])}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            its = its_names(model)[name]
            shape, fan = parameter.shape, math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 100
            numbers = np.random.RandomState(order[its]).standard_normal(shape) * (2 / fan) ** 0.5
            small = its.startswith(("rpn.score", "rpn.loc", "head.score", "head.cls_loc"))
            value = torch.tensor(numbers, dtype=torch.float32) * (0.1 if small else 1.0)
            parameter.copy_(rows_as_ours(its, value))
    model.rpn.fg_bg_sampler = Every(256, 0.5, last=True)
    model.roi_heads.fg_bg_sampler = Every(128, 0.25, last=False)
    return model


@pytest.fixture
def simple():
    return fill(build_model("faster_rcnn_vgg16", 3, **SIZES))


def test_the_pixels_are_the_originals(simple):
    image, _ = scene()
    batch, _ = simple.transform([image])
    assert list(batch.tensors.shape[1:]) == SIMPLE["pixels"]["shape"]
    np.testing.assert_allclose(batch.tensors[0, :, ::150, ::150], SIMPLE["pixels"]["some"], atol=2e-4)


def test_losses_gradients_and_a_step_are_the_originals(simple):
    """Through the task, the recipe's optimizer and its groups: biases at twice the rate, without decay."""
    config = compose_config("detection_voc", {})
    image, target = scene()
    optimizer = build_optimizer(config.optim, build(config.method), simple, config.decay_matrices_only, config.bias_lr)
    before = {name: parameter.detach().clone() for name, parameter in simple.named_parameters()}
    total, parts = Detection(config, 3).loss(simple.train(), ([image], [target]))
    names = ("rpn_cls_loss", "rpn_loc_loss", "roi_cls_loss", "roi_loc_loss")
    assert parts.tolist() == pytest.approx([SIMPLE["losses"][name] for name in names], rel=1e-5)
    total.backward()
    optimizer.step()
    its = its_names(simple)
    for name, parameter in simple.named_parameters():
        gradient, change = SIMPLE["parameters"][its[name]]
        assert parameter.grad.norm().item() == pytest.approx(gradient, rel=2e-3), name
        moved = (parameter.detach() - before[name]).double().norm().item()
        assert moved == pytest.approx(change, rel=2e-3), name


def test_what_is_found_is_the_originals(simple):
    image, _ = scene()
    with torch.no_grad():
        (found,) = simple.eval()([image])
    order = found["scores"].argsort(descending=True)[:20]
    wanted = SIMPLE["found"]
    assert len(found["scores"]) == wanted["count"]
    np.testing.assert_allclose(found["scores"][order], wanted["scores"], rtol=1e-4)
    assert (found["labels"][order] - 1).tolist() == wanted["labels"]
    np.testing.assert_allclose(found["boxes"][order], wanted["boxes_xyxy"], atol=0.1)


# -- py-faster-rcnn ---------------------------------------------------------------------------------

SIZED = [[55, 73, 382, 291], [455, 109, 600, 545], [545, 273, 873, 564], [9, 364, 109, 455]]


@pytest.fixture
def caffe():
    model = build_model("py_faster_rcnn_vgg16", 3, **SIZES)
    model.rpn.fg_bg_sampler = Every(256, 0.5, last=True)
    model.roi_heads.fg_bg_sampler = Every(128, 0.25, last=False)
    return model


def without_inclusive_ends(boxes):
    """Its right and bottom edges are the last pixels inside; ours lie behind them."""
    return torch.tensor(boxes) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def test_maps_and_anchors_are_caffes(caffe):
    """At 600 x 900 pixels, which are 37.5 x 56.25 cells, and are not resized."""
    batch, _ = caffe.transform([torch.rand(3, 600, 900)])
    assert list(caffe.backbone(batch.tensors).shape[-2:]) == CAFFE["map"]
    (cells,) = caffe.rpn.anchor_generator.cell_anchors
    torch.testing.assert_close(cells, without_inclusive_ends(CAFFE["anchors_xyxy_inclusive"]).float())


def test_anchors_are_trained_on_as_by_the_original(caffe):
    target = {"boxes": torch.tensor(SIZED).float(), "labels": torch.tensor(LABELS)}
    batch, _ = caffe.transform([torch.rand(3, 600, 900)])
    anchors = caffe.rpn.anchor_generator(batch, [torch.zeros(1, 64, *CAFFE["map"])])
    caffe.rpn._images = batch
    labels, boxes = caffe.rpn.assign_targets_to_anchors(anchors, [target])
    ((positive,), (negative,)) = caffe.rpn.fg_bg_sampler(labels)
    assert torch.where(positive)[0].tolist() == CAFFE["positive"]
    assert torch.where(negative)[0].tolist() == CAFFE["negative"]
    (moves,) = caffe.rpn.box_coder.encode(boxes, anchors)
    np.testing.assert_allclose(moves[positive], CAFFE["moves"], atol=1e-4)


def test_labels_of_all_anchors_follow_from_their_overlaps(caffe):
    """By definition: 1 from 0.7 on and for an object's highest, 0 below 0.3, else and across the edge -1."""
    target = {"boxes": torch.tensor(SIZED).float(), "labels": torch.tensor(LABELS)}
    batch, _ = caffe.transform([torch.rand(3, 600, 900)])
    (anchors,) = caffe.rpn.anchor_generator(batch, [torch.zeros(1, 64, *CAFFE["map"])])
    caffe.rpn._images = batch
    (labels,), _ = caffe.rpn.assign_targets_to_anchors([anchors], [target])
    overlaps = torchvision.ops.box_iou(target["boxes"], anchors)
    left, top, right, bottom = anchors.T
    overlaps[:, (left < 0) | (top < 0) | (right > 900) | (bottom > 600)] = float("nan")
    highest = (overlaps == overlaps.nan_to_num(-1).amax(dim=1, keepdim=True)).any(dim=0)
    own = overlaps.amax(dim=0)
    expected = torch.where(highest | (own >= 0.7), 1.0, torch.where(own < 0.3, 0.0, -1.0))
    assert torch.equal(labels, expected)
    assert ((own > 0.2) & (own < 0.3)).any()
    assert ((own > 0.3) & (own < 0.7)).any()


def test_regions_are_drawn_as_by_the_original(caffe):
    regions = CAFFE["regions"]
    target = {"boxes": torch.tensor(SIZED).float(), "labels": torch.tensor(LABELS)}
    proposals = torch.tensor(CAFFE["proposals"])
    boxes, _, (labels,), (moves,) = caffe.roi_heads.select_training_samples([proposals], [target])
    order = torch.cat([torch.where(labels > 0)[0], torch.where(labels == 0)[0]])  # its positives come first
    assert labels[order].tolist() == regions["labels"]
    expected = without_inclusive_ends(regions["boxes_inclusive"]).float()
    torch.testing.assert_close(boxes[0][order], expected, atol=2e-3, rtol=0)
    np.testing.assert_allclose(moves[labels > 0], regions["moves"], atol=1e-3)


@pytest.mark.parametrize(("positive", "negative"), [(500, 500), (10, 500), (500, 100)])
def test_as_many_anchors_and_regions_are_drawn_as_there_are(positive, negative):
    """Of 256 anchors half at most are positive, of 128 regions a quarter; others are not drawn in their place."""
    model = build_model("py_faster_rcnn_vgg16", 3, **SIZES)
    labels = torch.tensor([1.0] * positive + [0.0] * negative + [-1.0] * 50)
    for part, count, most in ((model.rpn, 256, 128), (model.roi_heads, 128, 32)):
        (chosen,), (others,) = part.fg_bg_sampler([labels])
        assert chosen.sum() == min(positive, most)
        assert others.sum() == min(negative, count - min(positive, most))
        assert (labels[chosen.bool()] == 1).all()
        assert (labels[others.bool()] == 0).all()


def test_answers_of_five_percent_count(simple):
    """And boxes of a class that overlap by 0.3 are one."""
    box = torch.tensor([[0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 100.0, 28.0], [0.0, 0.0, 100.0, 32.0]])
    chances = torch.tensor([[0.5, 0.404, 0.049, 0.047], [0.5, 0.051, 0.402, 0.047], [0.5, 0.302, 0.151, 0.047]])
    found = simple.roi_heads.postprocess_detections(chances.log(), torch.zeros(3, 16), [box], [(200, 200)])
    (boxes,), (scores,), (labels,) = found
    assert [(round(s, 3), n) for s, n in zip(scores.tolist(), labels.tolist(), strict=True)] == [
        (0.404, 1), (0.402, 2), (0.051, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sides", "expected"), [((333, 500), (600, 901)), ((500, 333), (901, 600)), ((300, 640), (469, 1000))]
)
def test_sides_are_rounded_to_the_nearest_pixel(simple, sides, expected):
    batch, _ = simple.transform([torch.rand(3, *sides)])
    assert batch.image_sizes == [expected]


@pytest.mark.parametrize(("overlap", "drawn"), [(0.0, True), (0.09, True), (0.11, False)])
def test_negatives_may_have_a_least_overlap(overlap, drawn):
    model = build_model("py_faster_rcnn_vgg16", 3, **SIZES, negatives_from=overlap)
    target = {"boxes": torch.tensor([[0.0, 0.0, 100.0, 100.0]]), "labels": torch.tensor([1])}
    tenth = torch.tensor([[0.0, 0.0, 100.0, 10.0]])  # of the object
    boxes, _, labels, _ = model.roi_heads.select_training_samples([tenth], [target])
    assert labels[0].tolist() == ([0, 1] if drawn else [1])


def test_the_recipe_of_py_faster_rcnn():
    """70,000 steps of two images, a tenth of the rate after 50,000, and weight decay for biases."""
    config = compose_config("detection_voc", {"recipe.source": "py_faster_rcnn"})
    assert total_steps(config, 5011) == 70_000
    factor, steps = build(config.schedule).factor, math.ceil(5011 / config.batch_size)
    assert [factor(step, steps, 70_000) for step in (0, 49_999, 50_000, 69_999)] == pytest.approx([1, 1, 0.1, 0.1])
    model = build_model(config.model["name"], 3, **SIZES)
    optimizer = build_optimizer(config.optim, build(config.method), model, config.decay_matrices_only, config.bias_lr)
    groups = optimizer.param_groups
    found = {(p.ndim > 1, group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {(True, 1e-3, 5e-4), (False, 2e-3, 5e-4)}
    assert [layer.p for layer in model.roi_heads.box_head if isinstance(layer, torch.nn.Dropout)] == [0.5, 0.5]
    assert model.roi_heads.detections_per_img == 100


# -- both -------------------------------------------------------------------------------------------


def test_small_proposals_go_before_the_best_are_counted(simple):
    """16 pixels of the file's image, not of the enlarged one."""
    image, _ = scene()
    batch, _ = simple.transform([image])
    (scale,) = batch.scales
    assert scale == pytest.approx(600 / 330)
    sides = torch.tensor([15.9, 16.1, 40.0, 15.0]) * scale
    corner = torch.arange(4).float() * 150
    boxes = torch.stack([corner, corner, corner + sides, corner + 100], dim=1)
    simple.train().rpn._images = batch
    simple.rpn._pre_nms_top_n = {"training": 2}
    (found,), _ = simple.rpn.filter_proposals(boxes[None], torch.tensor([[9.0, 1.0, 2.0, 8.0]]), batch.image_sizes, [4])
    torch.testing.assert_close(found, boxes[[2, 1]])


@pytest.mark.parametrize("source", ["simple_faster_rcnn", "py_faster_rcnn"])
def test_regions_are_pooled_as_by_torchvision(source):
    """Values and gradient, with regions that leave cells empty."""
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 5, 20, 30, generator=draw, dtype=torch.float32).requires_grad_()
    corners = 300 * torch.rand(2, 9, 2, generator=draw)
    boxes = torch.cat([corners, corners + 150 * torch.rand(2, 9, 2, generator=draw)], dim=2)
    boxes[0, 0] = torch.tensor([470.0, 310.0, 478.0, 318.0])
    model = build_model(compose_config("detection_voc", {"recipe.source": source}).model["name"], 3, **SIZES)
    ours = model.roi_heads.box_roi_pool({"0": maps}, list(boxes), [(320, 480)] * 2)
    theirs = torchvision.ops.roi_pool(maps, list(boxes), (7, 7), 1 / 16)
    assert torch.equal(ours, theirs)
    weights = torch.rand(ours.shape, generator=draw)
    gradients = [torch.autograd.grad((weights * pooled).sum(), maps)[0] for pooled in (ours, theirs)]
    torch.testing.assert_close(*gradients)
