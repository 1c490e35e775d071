"""Faster R-CNN (Ren et al., arXiv 1506.01497) with VGG-16, as its two usual implementations have it.

torchvision gives the frame; what it does otherwise than py-faster-rcnn and simple-faster-rcnn-pytorch is replaced here.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

from runfolder.errors import UserError

_STRIDE = 16  # pixels of the image per cell of conv5_3's map
_BIN = 7  # cells of a region's map in each direction
_RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors
_SCALES = (8, 16, 32)  # roots of their areas, in strides
_SMALLEST = 16  # sides of proposals, in pixels of the image as it is in the file
# Of timm's VGG and of torchvision's: the two hidden layers of the classifier, which become the region's.
_HIDDEN = {"pre_logits.fc1": "fc6", "pre_logits.fc2": "fc7", "classifier.0": "fc6", "classifier.3": "fc7"}


class FasterRCNNVGG(GeneralizedRCNN):
    """Boxes and classes of the objects in images of any sizes.

    The features are VGG-16's up to conv5_3 (stride 16) with all layers trained, the regions'
    two hidden layers are its fc6 and fc7. Images are resized inside: the shorter side to
    ``min_size``, unless the longer one then exceeds ``max_size``.

    Of an image, 256 anchors are trained on, half of them positive (overlap 0.7 or an object's
    highest) where there are so many, negatives below 0.3, none of them across the image's edge;
    and 128 regions, a quarter of them positive (overlap 0.5). Proposals have sides of 16 pixels
    of the file's image at least; 2,000 of the best 12,000 remain in training and 300 of 6,000 in
    testing. The smooth L1 loss of a difference d is d^2 / 2b below b and d - b/2 above, with b =
    1/9 for anchors and 1 for regions, summed over coordinates and divided by all anchors or
    regions drawn. Regions are pooled by RoIPool.

    Args:
        num_classes: of objects; the background comes in addition.
        width: channels of the first block, 64 in VGG-16; the others grow with it.
        hidden: width of fc6 and fc7.
        min_size: pixels.
        max_size: pixels.
        mean: of the pixels, from 0 to 1, per channel.
        std: likewise.
        ceil_pool: whether pooling keeps an odd last row and column, as Caffe does.
        whole_anchors: whether anchors' sides are whole pixels, as those of py-faster-rcnn.
        dropout: of fc6 and fc7.
        negatives_from: least overlap of a negative region with an object.
        detections: most of them for an image; null: no limit.

    Raises:
        UserError: an option out of its range.
    """

    task = "detection"

    def __init__(
        self,
        num_classes: int,
        width: int,
        hidden: int,
        min_size: int,
        max_size: int,
        mean: list[float],
        std: list[float],
        ceil_pool: bool,
        whole_anchors: bool,
        dropout: float,
        negatives_from: float,
        detections: int | None,
    ):
        for key, value, limit in (("dropout", dropout, 1.0), ("negatives_from", negatives_from, 0.5)):
            if not 0 <= value < limit:
                raise UserError(f"expected model.{key} to be at least 0 and below {limit:g}, got {value}.")
        if detections is not None and detections < 1:
            raise UserError(f"expected model.detections to be at least 1 or null, got {detections}.")
        features = make_layers([size if size == "M" else size * width // 64 for size in cfgs["D"][:-1]])
        channels = cfgs["D"][-2] * width // 64
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = ceil_pool
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        proposals = _Proposals(
            _Anchors(whole_anchors),
            _ObjectOrNot(channels, len(_RATIOS) * len(_SCALES)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 12000, "testing": 6000},
            post_nms_top_n={"training": 2000, "testing": 300},
            nms_thresh=0.7,
        )
        regions = _Regions(
            _RoIPool(),
            _hidden_layers(channels, hidden, dropout),
            FastRCNNPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=128,
            positive_fraction=0.25,
            bbox_reg_weights=None,  # 10, 10, 5, 5
            score_thresh=0.05,
            nms_thresh=0.3,
            detections_per_img=detections,
        )
        regions.negatives_from = negatives_from
        answers = regions.box_predictor
        for layer, spread in ((answers.cls_score, 0.01), (answers.bbox_pred, 0.001)):
            _normal(layer, spread)
        super().__init__(features, proposals, regions, _Resized(min_size, max_size, mean, std, size_divisible=1))

    def start_weights(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A VGG-16 classifier's weights (torchvision's or timm's) by this network's names.

        Returns:
            The weights, and the names of those that a classifier cannot give: of the proposals
            and of the answers. A detector's weights come back as they are.
        """
        if not any(name.startswith("features.") for name in weights):
            return weights, []
        renamed = {}
        for name, tensor in weights.items():
            layer, _, kind = name.rpartition(".")
            if layer in _HIDDEN:
                tensor = tensor.flatten(1) if kind == "weight" else tensor  # timm has them as convolutions
                renamed[f"roi_heads.box_head.{_HIDDEN[layer]}.{kind}"] = tensor
            elif layer.startswith("features."):
                renamed[f"backbone.{layer.removeprefix('features.')}.{kind}"] = tensor
        own = ("rpn.", "roi_heads.box_predictor.")
        return renamed, [name for name in self.state_dict() if name.startswith(own)]


def _normal(layer: nn.Module, spread: float) -> None:
    nn.init.normal_(layer.weight, std=spread)
    nn.init.zeros_(layer.bias)


def _hidden_layers(channels: int, hidden: int, dropout: float) -> nn.Sequential:
    """VGG's fc6 and fc7 on a region's map."""
    layers = nn.Sequential(nn.Flatten())
    for name, inputs in (("fc6", channels * _BIN * _BIN), ("fc7", hidden)):
        layer = nn.Linear(inputs, hidden)
        _normal(layer, 0.01)
        layers.add_module(name, layer)
        layers.add_module(f"{name}_relu", nn.ReLU())
        layers.add_module(f"{name}_dropout", nn.Dropout(dropout))
    return layers


class _Resized(GeneralizedRCNNTransform):
    """Images to the size of the network, rounded to the nearest pixel; the batch says by how much as ``scales``."""

    def forward(self, images: list[Tensor], targets: list | None = None) -> tuple[ImageList, list | None]:
        scales = [self.scale(image) for image in images]
        batch, targets = super().forward(images, targets)
        batch.scales = scales
        return batch, targets

    def scale(self, image: Tensor) -> float:
        """Of an image (3, height, width)."""
        shorter, longer = sorted(image.shape[-2:])
        return min(self.min_size[-1] / shorter, self.max_size / longer)

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        before = image.shape[-2:]
        after = [max(1, round(side * self.scale(image))) for side in before]
        image = F.interpolate(image[None], size=after, mode="bilinear", align_corners=False)[0]
        if target is None:
            return image, None
        ratios = [new / old for new, old in zip(after, before, strict=True)][::-1]
        return image, target | {"boxes": target["boxes"] * target["boxes"].new_tensor(2 * ratios)}


class _Anchors(AnchorGenerator):
    """Nine boxes around the centre of each cell: (cells * 9, 4) for each image, cell by cell."""

    def __init__(self, whole: bool):
        super().__init__((tuple(_STRIDE * scale for scale in _SCALES),), (_RATIOS,))
        sides = [(_STRIDE / math.sqrt(ratio), _STRIDE * math.sqrt(ratio)) for ratio in _RATIOS]
        if whole:
            wide = [round(width) for width, _ in sides]
            sides = [(width, round(width * ratio)) for width, ratio in zip(wide, _RATIOS, strict=True)]
        halves = [[scale * width / 2, scale * height / 2] for width, height in sides for scale in _SCALES]
        self.cell_anchors = [torch.tensor([[-w, -h, w, h] for w, h in halves]) + _STRIDE / 2]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """torchvision divides the image's size by the map's, which is the stride only where nothing is left over."""
        (maps,) = feature_maps
        self.set_cell_anchors(torch.float32, maps.device)
        stride = torch.tensor(_STRIDE, device=maps.device)
        (anchors,) = self.grid_anchors([maps.shape[-2:]], [[stride, stride]])
        return [anchors] * len(image_list.image_sizes)


class _ObjectOrNot(RPNHead):
    """Two scores of each anchor, of which the loss and the order take the difference: softmax instead of sigmoid."""

    def __init__(self, channels: int, anchors: int):
        super().__init__(channels, anchors)
        self.cls_logits = nn.Conv2d(channels, 2 * anchors, kernel_size=1)
        _normal(self.cls_logits, 0.01)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, moves = super().forward(x)
        halves = [score.chunk(2, dim=1) for score in scores]
        return [thing - background for background, thing in halves], moves


class _Proposals(RegionProposalNetwork):
    def forward(self, images: ImageList, features: dict, targets: list | None = None) -> tuple[list[Tensor], dict]:
        self._images = images
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list) -> tuple[list[Tensor], list[Tensor]]:
        """Labels 1, 0 or -1 (not trained on, as anchors across the edge are), and each anchor's box."""
        labels, boxes = [], []
        for own, target, (height, width) in zip(anchors, targets, self._images.image_sizes, strict=True):
            inside = (own[:, :2] >= 0).all(dim=1) & (own[:, 2] <= width) & (own[:, 3] <= height)
            label, box = own.new_full((len(own),), -1.0), own.clone()
            if inside.any():
                (label[inside],), (box[inside],) = super().assign_targets_to_anchors([own[inside]], [target])
            labels.append(label)
            boxes.append(box)
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """0 where an image is so small that no anchor fits in; torchvision's is then not a number."""
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        drawn, wanted = torch.cat([positive, negative]), torch.cat(labels)
        logits, moves = objectness.flatten()[drawn], torch.cat(regression_targets)[positive]
        kind = F.binary_cross_entropy_with_logits(logits, wanted[drawn], reduction="sum")
        place = F.smooth_l1_loss(pred_bbox_deltas[positive], moves, beta=1 / 9, reduction="sum")
        return kind / max(1, len(drawn)), place / max(1, len(drawn))

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list, num_anchors_per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Small ones go before the best are counted, not after."""
        found, chances = [], []
        logits = objectness.detach().reshape(len(proposals), -1)
        for boxes, scores, shape, scale in zip(proposals, logits, image_shapes, self._images.scales, strict=True):
            boxes = clip_boxes_to_image(boxes, shape)
            large = remove_small_boxes(boxes, _SMALLEST * scale)
            best = large[scores[large].topk(min(len(large), self.pre_nms_top_n())).indices]
            kept = best[nms(boxes[best], scores[best], self.nms_thresh)[: self.post_nms_top_n()]]
            found.append(boxes[kept])
            chances.append(scores[kept].sigmoid())
        return found, chances


class _RoIPool(nn.Module):
    """Largest value in each of 7 x 7 cells of a region, whose edges are rounded to the map's.

    torchvision says where it is; taking it from there has a gradient that adds up in a fixed order, on a GPU too.
    """

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        (maps,) = features.values()
        images = torch.cat([own.new_full((len(own), 1), number) for number, own in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1).float()
        _, places = torch.ops.torchvision.roi_pool(maps.detach().float(), regions, 1 / _STRIDE, _BIN, _BIN)
        rows = images.long() * maps.shape[1] + torch.arange(maps.shape[1], device=maps.device)  # (regions, channels)
        index = rows[:, :, None, None] * maps.shape[2] * maps.shape[3] + places.clamp(min=0)
        return torch.where(places < 0, 0.0, maps.flatten()[index])


class _Regions(RoIHeads):
    negatives_from: float

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in torchvision; negatives below ``negatives_from`` get -1, which is never drawn."""
        matches, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for own, true, label in zip(proposals, gt_boxes, labels, strict=True):
            if self.negatives_from > 0:
                overlap = self.box_similarity(own, true).amax(dim=1) if len(true) else own.new_zeros(len(own))
                label[(label == 0) & (overlap < self.negatives_from)] = -1
        return matches, labels

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list, targets: list | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The two losses in training, boxes with labels and scores else."""
        if self.training:
            proposals, _, labels, moves = self.select_training_samples(proposals, targets)
        scores, boxes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        if not self.training:
            parts = zip(*self.postprocess_detections(scores, boxes, proposals, image_shapes), strict=True)
            return [dict(zip(("boxes", "scores", "labels"), part, strict=True)) for part in parts], {}
        label, moves = torch.cat(labels), torch.cat(moves)
        positive = torch.where(label > 0)[0]
        given = boxes.unflatten(1, (-1, 4))[positive, label[positive]]
        kind = F.cross_entropy(scores, label, reduction="sum")
        place = F.smooth_l1_loss(given, moves[positive], beta=1.0, reduction="sum")
        drawn = max(1, len(label))
        return [], {"loss_classifier": kind / drawn, "loss_box_reg": place / drawn}
