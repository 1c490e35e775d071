"""Frozen whitening: which filters the first layer gets, from which images, and that they stay."""

import pytest
import torch
import torch.nn as nn

from experiments.config import build
from experiments.ranks import Ranks
from experiments.training import assembly
from experiments.training.loop import Trainer
from slurm.command import main
from tests.cases import tiny_config
from tests.same_runs import assert_equal_trees
from tests.test_experiments_loop import SGD, _train
from tract.methods.base import Setting
from tract.methods.composed import Composed
from tract.methods.patchnorm import PatchNormMethod
from tract.methods.whitening import WhiteningMethod, second_moment, whitening_filters

EPS = 1e-3


def images(count=40, channels=2, size=6):
    """Not white: neighbours are alike, and the mean is not 0."""
    x = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x + x.roll(1, 3) + 0.5 * x.roll(1, 2) + 0.3


def whitened(layer, batches, eps=EPS, **changes):
    method = WhiteningMethod(**{"layer": None, "images": 100, "eps": eps} | changes)
    model = nn.Sequential(layer, nn.ReLU())
    method.prepare(Setting(lambda: None, 1, 1, lambda count: batches))
    method.apply(model)
    return layer


def literal_patches(x, kernel, stride):
    """(patches, numbers), those within the image, one by one."""
    places = [range(0, x.shape[axis] - kernel + 1, stride) for axis in (2, 3)]
    return torch.stack([x[:, :, i : i + kernel, j : j + kernel].flatten(1) for i in places[0] for j in places[1]], 1)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_what_the_filters_give_is_white_over_the_images_own_patches(kernel, stride, padding):
    n, batches = 2 * kernel**2, images().split(16)
    layer = whitened(nn.Conv2d(2, 2 * n + 3, kernel, stride, padding), batches)
    rows = literal_patches(images(), kernel, stride).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    z = rows @ layer.weight.detach().flatten(1)[:n].double().T
    torch.testing.assert_close(z.T @ z / len(z), torch.diag(values / (values + EPS)), rtol=1e-4, atol=1e-4)


def test_a_linear_layer_is_whitened_over_its_rows():
    x = torch.randn(5, 7, 4) @ torch.randn(4, 4) + 1
    layer = whitened(nn.Linear(4, 4), [x])
    z = x.flatten(0, 1) @ layer.weight.T
    torch.testing.assert_close(z.T @ z / 35, torch.eye(4), rtol=0.05, atol=0.01)


@pytest.mark.parametrize(("filters", "plus", "minus"), [(3, 3, 0), (8, 8, 0), (11, 8, 3), (16, 8, 8), (21, 8, 8)])
def test_filters_are_eigenvectors_then_their_negatives_then_what_the_layer_drew(filters, plus, minus):
    layer = nn.Conv2d(2, filters, 2)
    drawn = layer.weight.detach().clone()
    whitened(layer, [images()])
    rows = literal_patches(images(), 2, 1).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    weight = layer.weight.detach().flatten(1).double()
    for i in range(plus):
        expected = vectors[:, -1 - i] / (values[-1 - i] + EPS).sqrt()
        expected = expected * expected[expected.abs().argmax()].sign()
        torch.testing.assert_close(weight[i], expected, rtol=1e-4, atol=1e-5)
        assert i >= minus or torch.equal(weight[plus + i], -weight[i])
    assert torch.equal(layer.weight[plus + minus :], drawn[plus + minus :])
    assert not layer.weight.requires_grad


def test_the_order_of_the_batches_decides_nothing():
    layer = nn.Conv2d(2, 8, 2)
    one, other = (second_moment(images().split(size), layer) for size in (40, 7))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whitening_filters(one, EPS), whitening_filters(other, EPS), rtol=1e-6, atol=1e-8)


# -- in whole runs ----------------------------------------------------------------------------------

SHORT = {"method": "whitening", "max_steps": 5, "ema_decay": 0.8}


@pytest.mark.parametrize("model", ["vit_small", "resnet_small"])
def test_the_weight_stays_to_the_bit_and_everything_else_is_trained(model, tmp_path, monkeypatch):
    first = {}
    run = Trainer.run

    def recording(trainer):
        first.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return run(trainer)

    monkeypatch.setattr(Trainer, "run", recording)
    _, _, state = _train(tmp_path, model=model, model__width=8, **SHORT, **SGD)
    name = {"vit_small": "emb.weight", "resnet_small": "conv1.weight"}[model]
    assert torch.equal(state["model"][name], first[name])
    assert torch.equal(state["ema"][f"module.{name}"], first[name])
    assert state["frozen"] == [name]
    assert name not in state["optimizer"]["state"]
    trained = {key for key, tensor in state["model"].items() if not torch.equal(tensor, first[key])}
    shifts = {key for key in first if key.endswith("attention.k.bias")}  # which softmax takes no notice of
    assert trained | shifts == first.keys() - {name}
    assert ("emb.bias" in trained) is (model == "vit_small")


@pytest.mark.parametrize("count", [7, 1150, 5000])
def test_so_many_of_the_images_that_are_trained_on_are_looked_at(count, tmp_path):
    """Not those that are held out; not augmented; the same ones on every rank."""
    config = tiny_config(tmp_path, method="whitening", validation_images=287)
    data = build(config.data).load()
    seen = []
    for rank in (0, 1):
        batches = assembly.build_batches(config, data, Ranks(rank, 2), torch.device("cpu"))
        seen.append(torch.cat(list(batches.some(count))))
    assert torch.equal(*seen)
    assert len(seen[0]) == min(count, 1150)
    held = set(batches.evaluated["val"].tolist())
    trained = [number for number in range(1437) if number not in held]
    numbers = [trained[i * 1150 // len(seen[0])] for i in range(len(seen[0]))]
    plain = data.train.images[numbers].float() / 255
    mean, std = (torch.tensor(getattr(data.options, key)) for key in ("mean", "std"))
    torch.testing.assert_close(seen[0], (plain - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-5)


def test_a_seed_decides_the_drawn_filters_and_the_images_the_others(tmp_path):
    states = [_train(tmp_path, seed=seed, **SHORT)[2]["model"]["emb.weight"] for seed in (0, 1)]
    assert torch.equal(states[0][:8], states[1][:8])  # patches of 4 numbers
    assert not torch.equal(states[0][8:], states[1][8:])


def test_with_patchnorm_before_it_the_normalised_patches_are_whitened():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(50, 4) * 3 + 1
    both = Composed(patchnorm=PatchNormMethod(None), whitening=WhiteningMethod(None, 10, EPS))
    both.prepare(Setting(lambda: None, 1, 1, lambda count: [x]))
    both.apply(model)
    z = model[0](x) - model[0].embedding.bias
    spread = (z.T @ z / 50).diagonal()
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=0, atol=0.02)  # the mean is gone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.eps=0.0"], "expected images of 1 or more and a finite eps above 0, got images=5000, eps=0.0"),
        (["method.images=0"], "got images=0"),
        (["method.layer=bn1"], "expected an nn.Linear or an nn.Conv2d without groups to whiten, got BatchNorm2d"),
        (["method.layer=conv7"], "expected the name of a layer of SmallResNet, got 'conv7'; nearest"),
        (["method=[whitening,tract]"], "got whitening and tract both on conv1.weight"),
    ],
)
def test_bad_values_are_one_sentence(words, message, tmp_path, capsys):
    words = [*([] if "method=" in words[0] else ["method=whitening"]), *words]
    assert main("quickstart", "", "", [*words, "max_steps=1", f"runtime.runs={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_without_images_it_says_so():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="expected training images to whiten, got none"):
        WhiteningMethod(None, 10, EPS).apply(model)


def test_the_model_is_as_it_was_but_for_the_weight():
    model = nn.Sequential(nn.Conv2d(2, 8, 2), nn.BatchNorm2d(8), nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "0.weight"}
    method = WhiteningMethod(None, 10, EPS)
    method.prepare(Setting(lambda: None, 1, 1, lambda count: [images()]))
    method.apply(model)
    assert_equal_trees(before, {name: tensor for name, tensor in model.state_dict().items() if name != "0.weight"})
    assert all(module.training for module in model.modules())
    assert not model[0]._forward_pre_hooks
