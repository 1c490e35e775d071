import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments.models import build_model
from tract import TrActConv2d, TrActLinear, apply_tract
from tract.methods.dual_patchnorm import DualPatchNormMethod
from tract.methods.patchnorm import PatchNormMethod
from tract.patches import EPS, PatchNormalisation, from_patches, to_patches

METHODS = {"patchnorm": PatchNormMethod(None), "dual_patchnorm": DualPatchNormMethod(None)}
# kernel, height, width: square and oblong patches, and images that are not covered by whole patches
GEOMETRIES = [((4, 4), 8, 12), ((2, 3), 6, 6), ((1, 1), 3, 2), ((3, 2), 7, 9)]
PIXELS = {"standardised": (1.0, 0.0), "0 to 255": (60.0, 127.0), "faint": (1e-3, 0.5)}


def _convolution(kernel, **options):
    return nn.Conv2d(3, 5, kernel, stride=kernel, dtype=torch.float64, **options)


def _applied(method, embedding):
    """A model of the embedding alone, with the method on it and parameters that are not where they start."""
    model = nn.Sequential(embedding)
    METHODS[method].apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, dict(model.named_parameters())


def _images(height, width, scale=1.0, shift=0.0):
    return scale * torch.randn(2, 3, height, width, dtype=torch.float64) + shift


def _literal_norm(rows, weight=1.0, bias=0.0):
    """(x - mean) / sqrt(variance + eps) * weight + bias, row by row."""
    done = [(row - row.mean()) / ((row - row.mean()).square().mean() + EPS).sqrt() for row in rows.flatten(0, -2)]
    return torch.stack(done).reshape(rows.shape) * weight + bias


def _literal(method, parameters, rows):
    """The whole embedding of patches as rows (..., n), written out."""
    before = [parameters[f"0.before.norm.{key}"] for key in ("weight", "bias")] if method == "dual_patchnorm" else []
    weight, bias = parameters["0.embedding.weight"].flatten(1), parameters.get("0.embedding.bias", 0.0)
    z = _literal_norm(rows, *before) @ weight.T + bias
    if method == "patchnorm":
        return z
    return _literal_norm(z, parameters["0.after.norm.weight"], parameters["0.after.norm.bias"])


# -- the equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_a_linear_embedding_follows_the_formula_written_out(method, pixels, shape):
    scale, shift = PIXELS[pixels]
    model, parameters = _applied(method, nn.Linear(12, 5, dtype=torch.float64))
    rows = scale * torch.randn(shape, dtype=torch.float64) + shift
    torch.testing.assert_close(model(rows), _literal(method, parameters, rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kernel", "height", "width"), GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_follows_the_formula_on_unfolded_patches(method, kernel, height, width, bias):
    model, parameters = _applied(method, _convolution(kernel, bias=bias))
    images = _images(height, width)
    rows = F.unfold(images, kernel, stride=kernel).mT
    expected = _literal(method, parameters, rows).mT.unflatten(2, (height // kernel[0], width // kernel[1]))
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(images[0]), expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_agrees_with_the_linear_layer_of_its_patches(method):
    by_images, parameters = _applied(method, _convolution((4, 4)))
    by_rows, _ = _applied(method, nn.Linear(48, 5, dtype=torch.float64))
    by_rows.load_state_dict({name: p.flatten(1) if p.dim() == 4 else p for name, p in parameters.items()})
    images = _images(8, 12).requires_grad_()
    from_rows, from_images = by_rows(F.unfold(images, 4, stride=4).mT), by_images(images).flatten(2).mT
    torch.testing.assert_close(from_rows, from_images)
    direction = torch.randn_like(from_rows)
    gradients = [torch.autograd.grad((out * direction).sum(), images)[0] for out in (from_rows, from_images)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pixels", PIXELS)
def test_patches_have_mean_0_and_standard_deviation_1(pixels):
    scale, shift = PIXELS[pixels]
    norm = PatchNormalisation(_convolution((4, 4)), affine=False)
    images = _images(8, 8, scale, shift)
    before, patches = (F.unfold(x, 4, stride=4).mT for x in (images, norm(images)))
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-10)
    variance = before.var(-1, correction=0)  # next to which eps is nothing, unless the contrast is below 1 in 1000
    torch.testing.assert_close(patches.var(-1, correction=0), variance / (variance + EPS))
    assert pixels == "faint" or torch.allclose(patches.std(-1, correction=0), torch.ones(2, 4).double(), atol=1e-5)


def test_brightness_and_contrast_of_a_patch_make_no_difference():
    norm = PatchNormalisation(_convolution((4, 4)), affine=False)
    images, levels = _images(8, 8), torch.rand(2, 1, 2, 2, dtype=torch.float64).repeat_interleave(4, 2)
    levels = levels.repeat_interleave(4, 3) + 0.5
    torch.testing.assert_close(norm(images * levels + 3 * levels), norm(images), rtol=1e-4, atol=1e-5)


def test_a_patch_of_one_value_becomes_zeros_with_finite_gradients():
    norm = PatchNormalisation(_convolution((4, 4)), affine=False)
    images = torch.full((1, 3, 4, 4), 7.0, dtype=torch.float64, requires_grad=True)
    norm(images).square().sum().backward()
    assert torch.equal(norm(images), torch.zeros_like(images))
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize(("kernel", "height", "width"), GEOMETRIES)
def test_cutting_into_patches_is_unfolding_and_can_be_undone(kernel, height, width):
    images = _images(height, width)
    rows = to_patches(images, kernel)
    assert torch.equal(rows, F.unfold(images, kernel, stride=kernel).mT)
    covered = images[:, :, : height // kernel[0] * kernel[0], : width // kernel[1] * kernel[1]]
    assert torch.equal(from_patches(rows, kernel, width // kernel[1]), covered)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda: _convolution((2, 2)), lambda: nn.Linear(6, 4, dtype=torch.float64)])
def test_gradients_are_those_of_finite_differences(method, make):
    model, parameters = _applied(method, make())
    shape = (2, 6) if "Linear" in str(model) else (1, 3, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = list(parameters)

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


# -- in a model ---------------------------------------------------------------------------------------

PARAMETERS = {"patchnorm": 0, "dual_patchnorm": 2 * 48 + 2 * 384}


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_vit_gains_the_normalisations_parameters_only(method):
    plain = build_model("vit_cifar", 10)
    model = copy.deepcopy(plain)
    said = METHODS[method].apply(model)
    assert " on emb: " in said
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
    assert count[1] - count[0] == PARAMETERS[method]
    assert model.emb.embedding.weight.shape == (384, 48)
    with torch.no_grad():  # a row of the linear layer is one patch: its order of pixels does not matter
        rows = plain.words(torch.randn(2, 3, 32, 32))
        z = F.layer_norm(rows, (48,), eps=EPS) @ plain.emb.weight.T + plain.emb.bias
        expected = z if method == "patchnorm" else F.layer_norm(z, (384,), eps=EPS)
        torch.testing.assert_close(model.emb(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_load_into_another_model_with_the_method(method):
    model, parameters = _applied(method, _convolution((2, 2)))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = nn.Sequential(_convolution((2, 2)))
    METHODS[method].apply(again)
    weights = torch.load(buffer, weights_only=True)
    METHODS[method].match(again, weights)
    again.load_state_dict(weights)
    images = _images(4, 4)
    assert torch.equal(again(images), model(images))
    assert all(torch.equal(p, parameters[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize("layer", ["1.0", None])
def test_the_named_or_the_first_layer_is_taken_and_stays_itself(layer):
    embedding = nn.Conv2d(3, 4, 2, 2)
    model = nn.Sequential(nn.Identity(), nn.Sequential(embedding, nn.ReLU()), nn.Flatten(), nn.Linear(16, 3))
    assert PatchNormMethod(layer).apply(model).startswith("PatchNorm on 1.0: ")
    assert model[1][0].embedding is embedding
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("order", ["tract first", "normalisation first"])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 2, 2), lambda: nn.Linear(12, 4)])
def test_tract_can_be_put_on_the_same_layer(order, make):
    model = nn.Sequential(make())
    steps = [lambda: apply_tract(model), lambda: METHODS["dual_patchnorm"].apply(model)]
    for step in steps if order == "tract first" else reversed(steps):
        step()
    assert isinstance(model[0].embedding, TrActConv2d | TrActLinear)


def test_normalisation_has_the_embeddings_dtype_and_device():
    model = nn.Sequential(nn.Linear(4, 3, device="meta", dtype=torch.bfloat16))
    METHODS["dual_patchnorm"].apply(model)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


# -- what is refused ----------------------------------------------------------------------------------


class _Subclass(nn.Linear):
    pass


REFUSED = {
    "overlapping": (lambda: nn.Conv2d(3, 4, 3, stride=2), ValueError, r"got stride=\(2, 2\); "),
    "with gaps": (lambda: nn.Conv2d(3, 4, 2, stride=3), ValueError, r"got stride=\(3, 3\); "),
    "one side": (lambda: nn.Conv2d(3, 4, (2, 4), stride=(2, 2)), ValueError, r"stride=kernel_size=\(2, 4\)"),
    "padded": (lambda: nn.Conv2d(3, 4, 4, 4, padding=1), ValueError, r"got padding=\(1, 1\); "),
    "groups": (lambda: nn.Conv2d(4, 4, 2, 2, groups=2), ValueError, "got groups=2; "),
    "dilated": (lambda: nn.Conv2d(3, 4, 2, 2, dilation=2), ValueError, r"got dilation=\(2, 2\); "),
    "all at once": (lambda: nn.Conv2d(4, 4, 3, 1, 1, groups=2), ValueError, r"stride=.*, padding=.*, groups=2; "),
    "one number": (lambda: nn.Linear(1, 4), ValueError, "at least 2 numbers, got 1"),
    "another layer": (lambda: nn.Conv1d(3, 4, 2, 2), TypeError, "got Conv1d; give layer=NAME"),
    "a subclass": (lambda: _Subclass(3, 4), TypeError, "got _Subclass; give layer=NAME"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_patch_embedding_is_refused_in_a_sentence_and_left_alone(method, case):
    make, kind, message = REFUSED[case]
    model = nn.Sequential(make())
    before = str(model)
    with pytest.raises(kind, match=message) as caught:
        METHODS[method].apply(model)
    assert "\n" not in str(caught.value)
    assert str(model) == before


def test_a_padding_that_is_none_is_accepted():
    assert PatchNormMethod(None).apply(nn.Sequential(nn.Conv2d(3, 4, 2, 2, padding="valid")))
