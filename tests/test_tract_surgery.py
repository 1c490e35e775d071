import ast
import logging
import re
import warnings

import pytest
import timm
import torch
import torch.nn as nn

from tests.tract_layers import error
from tract import TrAct, TrActConv2d, TrActLayer, TrActLinear, apply_tract, unwrap


class HeadFirst(nn.Module):
    """Registers its layers in the opposite order of use."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.stem(x).mean(dim=(2, 3)))


def _stem_first():
    return nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Flatten(), nn.Linear(8, 3))


def _tract_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, TrActLayer)]


def test_the_first_layer_in_order_of_registration_is_taken():
    model = _stem_first()
    assert apply_tract(model) == "1.0"
    assert _tract_names(model) == ["1.0"]


@pytest.mark.parametrize("name", ["stem.0", "head"])
def test_a_named_layer_is_taken(name):
    model = HeadFirst()
    assert apply_tract(model, layer=name) == name
    assert _tract_names(model) == [name]


def test_with_an_example_the_first_layer_in_order_of_use_is_taken():
    assert apply_tract(HeadFirst()) == "head"
    assert apply_tract(HeadFirst(), example=torch.randn(2, 3, 5, 5)) == "stem.0"


class SideBySide(nn.Module):
    """Two convolutions on the same image, one on a smaller one, and one further inside."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(3, 8, 1)
        self.small = nn.Conv2d(3, 4, 3, padding=1)
        self.inside = nn.Conv2d(8, 8, 3)
        self.text = nn.Linear(3, 8)

    def forward(self, x):
        whole = self.inside(self.narrow(x) + self.wide(x)).mean()
        return whole + self.small(x[..., ::2, ::2]).mean()


def test_first_layers_side_by_side_are_named_or_all_taken():
    """As of RepVGG, FastViT and CrossViT."""
    with pytest.warns(UserWarning, match=r"put on wide, not on narrow, small,.*layer=\['wide', 'narrow', 'small'\]"):
        assert apply_tract(model := SideBySide()) == "wide"
    assert _tract_names(model) == ["wide"]
    assert apply_tract(model := SideBySide(), example=torch.randn(2, 3, 8, 8)) == "narrow, wide"
    assert sorted(_tract_names(model)) == ["narrow", "wide"]
    assert apply_tract(model := SideBySide(), layer=["small", "wide", "small"]) == "small, wide"
    assert _tract_names(model) == ["wide", "small"]
    assert {model.small.label, model.wide.label} == {"small", "wide"}


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "mobileone_s0"])
def test_published_networks_with_several_first_layers_are_named(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.warns(UserWarning, match="not on stem") as warned:
        first = apply_tract(model)
    layers = ast.literal_eval(re.search(r"layer=(\[.*?\])", str(warned[0].message))[1])
    assert first in layers
    assert len(layers) == 2
    assert all(model.get_submodule(layer).in_channels == 3 for layer in layers)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_tiny", "coat_tiny", "mixer_s16_224"])
def test_networks_with_one_first_layer_need_no_word(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_tract(model)


def test_one_wrong_name_of_several_leaves_the_model_as_it_was():
    model = SideBySide()
    with pytest.raises(ValueError, match="got 'wied'; nearest: wide"):
        apply_tract(model, layer=["narrow", "wied"])
    assert _tract_names(model) == []


def test_the_example_leaves_no_trace():
    model = HeadFirst()
    model.stem[1].eval()
    modes = [module.training for module in model.modules()]
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    apply_tract(model, example=torch.randn(2, 3, 5, 5))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_parameters_and_checkpoints_of_the_model_are_unchanged():
    model = HeadFirst()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    apply_tract(model, layer="stem.0")
    assert list(model.state_dict()) == names
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    HeadFirst().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(HeadFirst().state_dict(), strict=True)


def test_options_reach_the_layer_and_the_choice_is_logged(caplog):
    model = _stem_first()
    with caplog.at_level(logging.INFO, logger="tract"):
        apply_tract(model, l=0.3, statistics="local")
    layer = model[1][0]
    assert (type(layer), layer.lambda_, layer.statistics, layer.label) == (TrActConv2d, 0.3, "local", "1.0")
    assert "lambda 0.3" in caplog.text
    assert "on 1.0: Conv2d(3, 8" in caplog.text


def test_a_model_without_a_supported_layer_is_an_error():
    with pytest.raises(ValueError, match="Linear, Conv1d, Conv2d, Conv3d, got Sequential with none"):
        apply_tract(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))


def test_a_lone_layer_is_an_error_that_says_how_to_wrap_it():
    with pytest.raises(ValueError, match=r"a lone layer is wrapped by TrAct\(layer\)"):
        apply_tract(nn.Linear(3, 2))


@pytest.mark.parametrize(("wrong", "nearest"), [("stem", None), ("stem.O", "stem.0"), ("haed", "head"), ("", "stem.0")])
def test_a_wrong_name_is_an_error_with_the_nearest_names(wrong, nearest):
    if nearest is None:
        with pytest.raises(TypeError, match="got Sequential"):
            apply_tract(HeadFirst(), layer=wrong)
    else:
        with pytest.raises(ValueError, match=f"got {wrong!r}; nearest: {nearest}"):
            apply_tract(HeadFirst(), layer=wrong)


def test_a_model_that_has_tract_already_is_an_error_that_names_the_layer():
    model = HeadFirst()
    apply_tract(model, layer="stem.0")
    with pytest.raises(ValueError, match=r"TrAct on 'stem\.0' already; tract\.unwrap\(model\) takes it off"):
        apply_tract(model)


def test_an_error_leaves_the_model_as_it_was():
    model = HeadFirst()
    with pytest.raises(ValueError, match="lambda_ > 0"):
        apply_tract(model, lambda_=-1)
    assert not _tract_names(model)


def test_an_example_that_reaches_no_layer_is_an_error():
    model = nn.ModuleDict({"unused": nn.Linear(3, 2)})
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="reach a Linear or Conv layer, got none; give layer=NAME"):
        apply_tract(model, example=torch.zeros(1))


def test_a_shared_layer_is_replaced_at_every_place_and_restored_at_every_place():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    model.alias = shared
    apply_tract(model)
    assert isinstance(model[0], TrActLinear)
    assert model[0] is model[2][0] is model.alias
    unwrap(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2][0] is model.alias
    assert model[0].weight is shared.weight


def test_unwrapping_gives_the_plain_gradients_back():
    model, x = HeadFirst().double().eval(), torch.randn(4, 3, 5, 5).double()

    def gradient():
        model.zero_grad()
        model(x).square().sum().backward()
        return model.stem[0].weight.grad.clone()

    plain = gradient()
    apply_tract(model, layer="stem.0")
    assert error(gradient(), plain) > 0.01
    assert unwrap(model) is model
    assert not _tract_names(model)
    assert torch.equal(gradient(), plain)


def test_unwrapping_a_plain_model_is_an_error():
    with pytest.raises(ValueError, match="there is nothing to unwrap"):
        unwrap(HeadFirst())


class Subclass(nn.Conv2d):
    pass


UNSUPPORTED = {
    "lazy": lambda: nn.LazyConv2d(8, 3),
    "subclass": lambda: Subclass(3, 8, 3),
    "parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
}


@pytest.mark.parametrize("make_first", UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("by_example", [False, True])
def test_a_first_layer_that_cannot_be_wrapped_is_refused_not_passed_over(make_first, by_example):
    model = nn.Sequential(make_first(), nn.Conv2d(8, 8, 3))
    example = torch.zeros(1, 3, 8, 8) if by_example and not isinstance(model[0], nn.LazyConv2d) else None
    with pytest.raises(TypeError, match="TrAct supports nn.Linear"):
        apply_tract(model, example=example)


def test_unwrapping_under_a_parametrization_is_refused():
    wrapped = nn.utils.parametrizations.spectral_norm(TrAct(nn.Conv2d(3, 8, 3)))
    with pytest.raises(TypeError, match="remove the parametrization"):
        unwrap(wrapped)
