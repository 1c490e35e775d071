"""The networks of "Learning Neural Network Subspaces": against formulas written out, and against torchvision's."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet as torchvision_resnet

from experiments.models import build_model
from experiments.models.subspace_networks import cifar_resnet

CIFAR = {"depth": 14, "width": 4, "dropout": 0.0}
TINY = {"tiny_imagenet_resnet18": torchvision_resnet.resnet18, "tiny_imagenet_resnet50": torchvision_resnet.resnet50}
IMAGENET = {"subspace_resnet50": torchvision_resnet.resnet50, "wide_resnet50_2": torchvision_resnet.wide_resnet50_2}
COUNTS = {
    ("cifar_resnet_20", 10): 272_464,
    ("tiny_imagenet_resnet18", 200): 11_271_232,
    ("tiny_imagenet_resnet50", 200): 23_909_952,
    ("subspace_resnet50", 1000): 25_556_032,
    ("wide_resnet50_2", 1000): 68_882_240,
}


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _on_meta(name, classes, **options):
    with torch.device("meta"):
        return build_model(name, classes, **options)


# -- counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameters_are_as_many_as_documented(name, classes):
    assert _count(_on_meta(name, classes)) == COUNTS[name, classes]


@pytest.mark.parametrize(("depth", "width"), [(8, 16), (20, 16), (32, 16), (14, 5), (20, 64)])
def test_parameters_are_as_many_as_a_sum_over_layers(depth, width):
    n, w = (depth - 2) // 6, width
    norm = lambda channels: 2 * channels  # noqa: E731
    count = 27 * w + norm(w) + n * 2 * (9 * w * w + norm(w))
    for before, after in ((w, 2 * w), (2 * w, 4 * w)):
        count += 9 * before * after + 9 * after * after + before * after + 3 * norm(after)
        count += (n - 1) * 2 * (9 * after * after + norm(after))
    count += 4 * w * 10
    model = _on_meta("cifar_resnet_20", 10, depth=depth, width=width)
    assert _count(model) == count
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth + 2  # the shortcuts beside


@pytest.mark.parametrize("name", [name for name, _ in COUNTS])
def test_only_norms_have_biases(name):
    for module in _on_meta(name, 10).modules():
        assert isinstance(module, nn.BatchNorm2d) or getattr(module, "bias", None) is None


@pytest.mark.parametrize("depth", [2, 7, 11, 18])
def test_a_depth_that_no_such_network_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"8, 14, 20 or another 6n \\+ 2, got {depth}"):
        cifar_resnet(10, depth=depth, width=16, dropout=0.0)


# -- start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("cifar_resnet_20", {"width": 64}), ("tiny_imagenet_resnet18", {})])
def test_weights_start_from_kaimings_normal_distribution_of_fan_in(name, options):
    model, seen = build_model(name, 200, **options), 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 2e4:
            weight = module.weight.detach()
            assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.03)
            assert weight.abs().max() > 3 * weight.std()  # uniform numbers end at 1.7 deviations
            seen += 1
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert seen > 10


# -- functions ---------------------------------------------------------------------------------------


def _literal_cifar_resnet(weights, x, blocks):
    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, x):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        scaled = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    x = F.relu(norm("bn", conv("conv", x)))
    for k in range(blocks):
        new_stage = k > 0 and k % (blocks // 3) == 0
        out = F.relu(norm(f"blocks.{k}.bn1", conv(f"blocks.{k}.conv1", x, 2 if new_stage else 1)))
        out = norm(f"blocks.{k}.bn2", conv(f"blocks.{k}.conv2", out))
        if new_stage:
            x = norm(f"blocks.{k}.downsample.1", conv(f"blocks.{k}.downsample.0", x, 2))
        features = x + out
        x = F.relu(features)
    scores = F.conv2d(F.avg_pool2d(x, x.shape[-1]), weights["fc.weight"][:, :, None, None])  # as the original has it
    return scores.flatten(1), features


def _captured(model, x):
    """(scores, features) by a forward hook on what ``features_layer`` names."""
    kept = []
    hook = model.get_submodule(model.features_layer).register_forward_hook(lambda _, __, out: kept.append(out))
    scores = model(x)
    hook.remove()
    (features,) = kept
    return scores, features


def _shuffled(model):
    """Norms that scale and shift, so that an order of layers that is wrong shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(("depth", "channels"), [(8, 3), (14, 1), (20, 3)])
def test_the_cifar_network_equals_its_blocks_written_out(depth, channels):
    options = CIFAR | {"depth": depth, "in_channels": channels}
    model = _shuffled(build_model("cifar_resnet_20", 7, **options)).double()
    x = torch.randn(5, channels, 16, 16).double()
    expected = _literal_cifar_resnet(dict(model.named_parameters()), x, (depth - 2) // 2)
    torch.testing.assert_close(_captured(model, x), expected)


def _with_our_weights(model, other):
    state = model.state_dict() | {"fc.bias": torch.zeros(model.fc.out_features)}
    other.fc = nn.Linear(*model.fc.weight.shape[::-1])
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_imagenet_networks_are_torchvisions_with_another_stem(name):
    model, other = _shuffled(build_model(name, 11)), TINY[name]()
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    other, x = _with_our_weights(model, other), torch.randn(2, 3, 32, 32)
    last, kept = other.layer4[-1], []
    norm = last.bn2 if name.endswith("18") else last.bn3
    last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].clone()))
    norm.register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    expected = other(x)
    scores, features = _captured(model, x)
    assert torch.equal(scores, expected)
    assert torch.equal(features, kept[0] + kept[1])
    assert features.shape == (2, 512 if name.endswith("18") else 2048, 4, 4)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_networks_are_torchvisions_without_the_last_bias(name):
    model, x = build_model(name, 11).eval(), torch.randn(1, 3, 64, 64)
    scores, features = _captured(model, x)
    assert torch.equal(scores, _with_our_weights(model, IMAGENET[name]()).eval()(x))
    assert features.shape == (1, 2048, 1, 1)
    torch.testing.assert_close(features.flatten(1) @ model.fc.weight.T, scores)


@pytest.mark.parametrize(("name", "options"), [("cifar_resnet_20", CIFAR), ("tiny_imagenet_resnet18", {})])
def test_features_are_what_the_last_relu_gets_also_after_the_pass(name, options):
    model = _shuffled(build_model(name, 5, **options))
    scores, features = _captured(model, torch.randn(4, 3, 32, 32))
    assert (features < 0).any()
    torch.testing.assert_close(F.relu(features).mean((2, 3)) @ model.fc.weight.T, scores)


def test_dropout_halves_what_follows_the_second_norm_and_is_off_in_evaluation():
    """The entries of a branch that are left are doubled; the shortcut is as it was."""
    block = build_model("cifar_resnet_20", 5, **(CIFAR | {"dropout": 0.5})).double().blocks[0]
    plain, x = copy.deepcopy(block), torch.rand(64, 4, 8, 8).double()
    plain.dropout.p = 0.0
    sums = []
    for module in (block, plain):
        module.sum.register_forward_hook(lambda _, __, out: sums.append(out))
        module(x)
    dropped, whole = (out - x for out in sums)
    left = dropped.abs() > 1e-12
    assert left.double().mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(dropped[left], 2 * whole[left])
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", IMAGENET)
def test_grey_images_are_refused_for_imagenet(name):
    with pytest.raises(ValueError, match="colour images"):
        _on_meta(name, 10, in_channels=1)
