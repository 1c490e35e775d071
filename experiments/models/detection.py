"""Faster R-CNN (Ren et al., arXiv 1506.01497) with VGG-16, from torchvision's parts."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import MultiScaleRoIAlign

_STRIDE = 16  # pixels of the image per cell of conv5_3's map
_BIN = 7  # cells of a region's map in each direction
# Of timm's VGG and of torchvision's: the two hidden layers of the classifier, which become the region's.
_HIDDEN = {"pre_logits.fc1": 1, "pre_logits.fc2": 4, "classifier.0": 1, "classifier.3": 4}


class FasterRCNNVGG(FasterRCNN):
    """Boxes and classes of the objects in images of any sizes.

    The features are VGG-16's up to conv5_3 (stride 16) with all layers trained, the regions'
    two hidden layers are its fc6 and fc7. Anchors, numbers of proposals and the initial
    weights of new layers are those of the paper; regions are pooled by RoIAlign instead of
    rounded cells. Images are resized inside: the shorter side to ``min_size``, unless the
    longer one then exceeds ``max_size``.

    Args:
        num_classes: of objects; the background comes in addition.
        width: channels of the first block, 64 in VGG-16; the others grow with it.
        hidden: width of fc6 and fc7.
        min_size: pixels.
        max_size: pixels.
        mean: of the pixels, from 0 to 1, per channel.
        std: likewise.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        hidden: int,
        min_size: int,
        max_size: int,
        mean: list[float],
        std: list[float],
    ):
        plan = [size if size == "M" else size * width // 64 for size in cfgs["D"][:-1]]
        features = make_layers(plan)
        features.out_channels = channels = plan[-1]
        sizes = tuple(_STRIDE * scale for scale in (8, 16, 32))
        anchors = AnchorGenerator((sizes,), ((0.5, 1.0, 2.0),))
        super().__init__(
            features,
            min_size=min_size,
            max_size=max_size,
            image_mean=mean,
            image_std=std,
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=12000,
            rpn_pre_nms_top_n_test=6000,
            rpn_post_nms_top_n_train=2000,
            rpn_post_nms_top_n_test=300,
            box_roi_pool=MultiScaleRoIAlign(["0"], _BIN, sampling_ratio=2),
            box_head=_hidden_layers(channels, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
            box_nms_thresh=0.3,
            box_batch_size_per_image=128,
        )
        answers = self.roi_heads.box_predictor
        for layer, spread in ((answers.cls_score, 0.01), (answers.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

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


def _hidden_layers(channels: int, hidden: int) -> nn.Sequential:
    """VGG's fc6 and fc7 with dropout, on a region's map."""
    first, second = nn.Linear(channels * _BIN * _BIN, hidden), nn.Linear(hidden, hidden)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout())
