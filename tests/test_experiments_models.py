import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet as torchvision_resnet

from experiments.config import choices_of
from experiments.models import build_model
from experiments.models.resnet import BasicBlock
from runfolder.errors import UserError
from tests.cifar100_reference import FACTS

# weiaicunzai/pytorch-cifar100 @ 11d8418 and omihub777/ViT-CIFAR @ ab9043e, counted from the originals.
COUNTS = {
    ("resnet18", 100): 11_220_132,
    ("resnet34", 100): 21_328_292,
    ("resnet50", 100): 23_705_252,
    ("vit_cifar", 10): 6_268_810,
    ("vit_cifar", 100): 6_303_460,
}


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameters_are_as_many_as_in_the_originals(name, classes):
    with torch.device("meta"):
        model = build_model(name, classes)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, classes]
    if name == "vit_cifar":
        assert (len(list(model.parameters())), len(list(model.buffers()))) == (120, 0)


# Outputs of the same two repositories with weights that depend only on a tensor's shape and role.
CHECK_VALUES = {
    ("resnet34", 100): ([6.18520359, -0.520281625, -0.00899662833, -0.692067128], 27.6763111, 4.68537068, 11.0490788),
    ("resnet50", 100): ([10.909105, 1.16116976, 0.0210118796, 0.296300061], 42.5733412, 8.21053905, 70.5163019),
    ("vit_cifar", 10): ([4.96910537, 1.17411385, -0.408545013, -0.804851709], 12.0871799, 3.92810302, 0.872277743),
    ("vit_cifar", 100): ([4.96910537, 1.17411385, -0.408545013, -0.804851709], 29.0195386, 4.8555628, 0.604222736),
}


def _spread(shape):
    """Numbers in [-0.5, 0.5) from integer arithmetic only."""
    i = torch.arange(math.prod(shape))
    return (((i * i * 40503 + i * 2654435761 + 12345) % 2**32).double() / 2**32 - 0.5).view(shape)


@torch.no_grad()
def _fill(model):
    for module in model.double().modules():
        for name, p in module.named_parameters(recurse=False):
            scale, shift = 0.2, 0.0
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                shift = float(name == "weight")
            elif isinstance(module, nn.Conv2d | nn.Linear) and p.dim() > 1:
                scale = math.sqrt(24 / p[0].numel())
            p.copy_(shift + scale * _spread(p.shape))


@pytest.mark.parametrize(("name", "classes"), CHECK_VALUES)
def test_networks_compute_what_the_originals_compute(name, classes):
    model = build_model(name, classes)
    _fill(model)  # BatchNorm uses the batch's statistics, as in training
    first = model.emb if name == "vit_cifar" else model.conv1
    scores = model(math.sqrt(12) * _spread((4, 3, 32, 32)))
    loss = F.cross_entropy(scores, torch.arange(4))
    loss.backward()
    got = [*scores[0, :4], scores.norm(), loss, first.weight.grad.norm()]
    logits, *rest = CHECK_VALUES[name, classes]
    assert [value.item() for value in got] == pytest.approx([*logits, *rest], rel=2e-8)


# -- residual networks, literally ------------------------------------------------------------------


def _literal_resnet(weights, x, blocks, maxpool):
    """Basic blocks written out with functions; ``blocks`` yields (prefix, stride)."""

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    x = F.relu(norm("bn1", conv("conv1", x)))
    if maxpool:
        x = F.max_pool2d(x, 3, 2, 1)
    for prefix, stride in blocks:
        out = F.relu(norm(f"{prefix}.bn1", conv(f"{prefix}.conv1", x, stride)))
        out = norm(f"{prefix}.bn2", conv(f"{prefix}.conv2", out))
        if f"{prefix}.downsample.0.weight" in weights:
            x = norm(f"{prefix}.downsample.1", conv(f"{prefix}.downsample.0", x, stride))
        x = F.relu(out + x)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


RESNET18 = [
    (f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1) for stage in (1, 2, 3, 4) for block in (0, 1)
]
SMALL = [("blocks.0", 1), ("blocks.1", 2), ("blocks.2", 2)]


@pytest.mark.parametrize(
    ("name", "blocks", "options", "channels"),
    [
        ("resnet18", RESNET18, {"maxpool": False}, 3),
        ("resnet18", RESNET18, {"maxpool": True, "kaiming": True}, 3),
        ("resnet_small", SMALL, {"width": 8}, 1),
    ],
)
def test_residual_networks_equal_their_blocks_written_out(name, blocks, options, channels):
    model = build_model(name, 10, in_channels=channels, **options).double()
    x = torch.randn(4, channels, 16, 16).double()
    expected = _literal_resnet(dict(model.named_parameters()), x, blocks, options.get("maxpool"))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 16)])
def test_the_small_networks_block_is_torchvisions(inputs, outputs):
    """The same weights under the same names from the same seed, and the same output."""

    def theirs() -> nn.Module:
        if inputs == outputs:
            return torchvision_resnet.BasicBlock(inputs, outputs)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
        return torchvision_resnet.BasicBlock(inputs, outputs, stride=2, downsample=shortcut)

    blocks = []
    for make in (theirs, lambda: BasicBlock(inputs, outputs)):
        torch.manual_seed(0)
        blocks.append(make())
    first, second = (block.state_dict() for block in blocks)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.randn(4, inputs, 8, 8)
    assert torch.equal(*(block(x) for block in blocks))


@pytest.mark.parametrize("kaiming", [True, False])
def test_convolutions_start_as_asked(kaiming):
    model = build_model("resnet18", 10, kaiming=kaiming)
    for weight in (m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 1e5):
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        # Kaiming normal: 2 / fan out. PyTorch's own: uniform on +-fan_in^-1/2, variance 1 / (3 fan_in).
        expected = (2 / fan_out) ** 0.5 if kaiming else (3 * fan_in) ** -0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert (weight.abs().max() <= fan_in**-0.5) != kaiming


# -- vision transformers ---------------------------------------------------------------------------


def test_words_are_the_patches_row_by_row_with_the_channel_fastest():
    model, x = build_model("vit_small", 10, in_channels=3, patch=4), torch.randn(2, 3, 8, 8)
    patches = F.unfold(x, 4, stride=4)  # (batch, channel x row x column, tokens)
    expected = patches.unflatten(1, (3, 16)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(model.words(x), expected)


def test_attention_divides_scores_by_the_root_of_the_width():
    attention = build_model("vit_small", 10).blocks[0].attention.double()
    x = torch.randn(2, 5, 64).double()
    heads = [layer(x).view(2, 5, 4, 16) for layer in (attention.q, attention.k, attention.v)]
    weights = (torch.einsum("bihd,bjhd->bhij", *heads[:2]) / 8).softmax(-1)
    expected = attention.o(torch.einsum("bhij,bjhd->bihd", weights, heads[2]).reshape(2, 5, 64))
    torch.testing.assert_close(attention(x), expected)


# -- all networks -----------------------------------------------------------------------------------


def _tiny(name, **options):
    small = name in ("resnet_small", "vit_small")
    x = torch.randn(4, 1, 8, 8) if small else torch.randn(2, 3, 32, 32)
    return build_model(name, 10, in_channels=x.shape[1], image_size=x.shape[2], **options), x


# Those of the CIFAR-100 table have a file of tests of their own, as have the detectors.
OTHERS = {*FACTS, "faster_rcnn_vgg16", "py_faster_rcnn_vgg16"} - {"resnet18"}
NETWORKS = [name for name in choices_of("model") if name not in OTHERS]


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_survive_a_file_and_the_network_does_not_depend_on_its_start(name, tmp_path):
    model, x = _tiny(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other, _ = _tiny(name)
    model.eval()
    other.eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet_small", "vit_small"])
def test_other_memory_formats_and_half_precision_give_the_same_network(name):
    model, x = _tiny(name)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    error = (half.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.1  # bfloat16 has eight bits


def test_unknown_networks_and_bad_sizes_are_refused():
    with pytest.raises(UserError, match="nearest: resnet18"):
        build_model("resnet19", 10)
    with pytest.raises(ValueError, match="divisible"):
        build_model("vit_small", 10, patch=3)
