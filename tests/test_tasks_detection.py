"""Detection: Faster R-CNN's weights, its loss, and whole runs."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import build, compose_config, folder_of
from experiments.data.batches import Batches
from experiments.data.boxes import BoxSamples
from experiments.models import build_model
from experiments.ranks import Ranks
from experiments.tasks.detection import Detection
from experiments.training.loop import StoppedError
from experiments.training.run import run
from experiments.training.stop import StopRequest, Wish
from runfolder.errors import UserError
from slurm.command import main
from tests.voc_folder import voc2007
from tract import TrActConv2d

CPU = torch.device("cpu")
TINY = {
    "model.width": 8, "model.hidden": 16, "model.min_size": 160, "model.max_size": 240, "start_from": None,
    "runtime.workers": 0, "runtime.progress": False, "runtime.threads": 1,
}  # fmt: skip


def tiny_config(voc, runs, **changes):
    return compose_config("detection_voc", TINY | {"data.root": str(voc), "runtime.runs": str(runs)} | changes)


# -- network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torchvision.models.vgg16, lambda: timm.create_model("vgg16")], ids=["vision", "timm"])
def test_a_classifiers_weights_fill_features_and_hidden_layers(make):
    with torch.device("meta"):
        detector, classifier = build_model("faster_rcnn_vgg16", 20), make()
    weights, fresh = detector.start_weights(classifier.state_dict())
    own = {name: tensor.shape for name, tensor in detector.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == {k: v for k, v in own.items() if k not in fresh}
    assert all(name.startswith(("rpn.", "roi_heads.box_predictor.")) for name in fresh)
    assert detector.start_weights(own) == (own, [])


def test_weights_survive_a_file():
    images = [torch.rand(3, 80, 120), torch.rand(3, 60, 60)]
    first, second = (build_model("faster_rcnn_vgg16", 3, width=8, hidden=16, min_size=64).eval() for _ in range(2))
    proposals = [model(images)[0]["boxes"] for model in (first, second)]
    assert not torch.equal(*proposals)
    second.load_state_dict(first.state_dict())
    for mine, its in zip(first(images), second(images), strict=True):
        assert all(torch.equal(mine[key], its[key]) for key in ("boxes", "labels", "scores"))


def test_a_run_starts_from_a_classifier(voc, tmp_path, capsys):
    """A file in torchvision's form; timm's hidden layers are convolutions of the same order."""
    model = build_model("faster_rcnn_vgg16", 2, width=8, hidden=16)
    own = model.state_dict()
    file = {k.replace("backbone", "features"): torch.randn_like(v) for k, v in own.items() if "backbone" in k}
    file |= {f"classifier.{i}.{kind}": torch.randn_like(own[f"roi_heads.box_head.{name}.{kind}"])
             for i, name in ((0, "fc6"), (3, "fc7")) for kind in ("weight", "bias")}  # fmt: skip
    torch.save(file, tmp_path / "vgg.pth")
    config = tiny_config(voc, tmp_path, start_from=str(tmp_path / "vgg.pth"), max_steps=1, **{"optim.lr": 1e-30})
    run(config)
    trained = torch.load(next(folder_of(config).path.glob("checkpoints/*.pt")), weights_only=True)["model"]
    assert torch.equal(trained["backbone.2.weight"], file["features.2.weight"])
    assert torch.equal(trained["roi_heads.box_head.fc7.bias"], file["classifier.3.bias"])
    assert "fresh: rpn.head.conv.0.0.weight" in folder_of(config).log.read_text()


# -- runs -------------------------------------------------------------------------------------------


def test_perfect_answers_are_100_percent_and_moved_ones_0(voc):
    data = voc2007(str(voc), flip=True)
    task = Detection(compose_config("detection_voc", {}), len(data.classes))
    options = {"overfit": None, "eval_batch_size": 2}
    batches = Batches(data, seed=0, batch_size=1, drop_last=False, workers=0, ranks=Ranks(), device=CPU, **options)

    def score(shift):
        truth = iter([target for _, targets in batches.test() for target in targets])
        answers = lambda images: [  # noqa: E731
            {"boxes": t["boxes"] + shift, "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
            for t in (next(truth) for _ in images)
        ]
        return task.evaluate(answers, batches.test(), len(data.test), Ranks(), lambda: None)["map"]

    assert score(0) == pytest.approx(100)
    assert score(1000) == 0


def test_the_loss_is_the_networks_on_the_objects_that_count(voc):
    data = voc2007(str(voc), flip=False)
    task = Detection(compose_config("detection_voc", {}), len(data.classes))
    samples = BoxSamples(data, 0, 1)
    images, targets = samples.ready(samples["train", None, [0, 1, 2, 3]], CPU)
    assert any(target["difficult"].any() for target in targets)
    given = []

    def network(images, targets):
        given.extend(targets)
        return {name: torch.tensor(float(k + 1)) for k, name in enumerate(reversed(task.measures))}

    total, parts = task.loss(network, (images, targets))
    assert (total.item(), parts.tolist()) == (40.0, [16.0, 12.0, 8.0, 4.0])  # four images
    assert [len(t["boxes"]) for t in given] == [int((~t["difficult"]).sum()) for t in targets]
    pieces = list(task.split((images, targets), 3))
    assert [len(part[0]) for part in pieces] == [2, 1, 1]
    assert sum((part[1] for part in pieces), []) == targets


@pytest.mark.parametrize("model", ["faster_rcnn_vgg16", "py_faster_rcnn_vgg16"])
@pytest.mark.parametrize(("sides", "objects"), [((48, 60), 1), ((160, 240), 0)], ids=["no anchor inside", "no object"])
def test_the_loss_is_finite_without_an_anchor_or_an_object(model, sides, objects):
    detector = build_model(model, 3, width=8, hidden=16, min_size=min(sides), max_size=max(sides)).train()
    box = torch.tensor([[4.0, 5.0, 40.0, 45.0]])[:objects]
    losses = detector([torch.rand(3, *sides)], [{"boxes": box, "labels": torch.ones(objects, dtype=torch.int64)}])
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in detector.parameters())


@pytest.mark.parametrize(
    ("data", "model", "wanted"),
    [
        ("voc2007", "resnet_small", "a detector, such as faster_rcnn_vgg16,"),
        ("digits", "faster_rcnn_vgg16", "a classifier"),
    ],
)
def test_a_network_of_another_task_is_refused(voc, tmp_path, data, model, wanted):
    changes = {"data": data, "model": model, "runtime.runs": str(tmp_path), "start_from": None}
    changes |= {"data.root": str(voc)} if data == "voc2007" else {}
    with pytest.raises(UserError, match=f"expected model={wanted}.* for data={data}, got {model}"):
        run(compose_config("detection_voc", changes))


@pytest.mark.parametrize("changes", [{"mixup": 0.1}, {"label_smoothing": 0.1}, {"loss": "bce"}], ids=str)
def test_what_belongs_to_classification_is_refused(voc, tmp_path, changes):
    (key,) = changes
    with pytest.raises(UserError, match=f"expected {key} to be .* for detection"):
        run(tiny_config(voc, tmp_path, **changes))


def test_the_first_layer_is_the_networks_first_convolution(voc, tmp_path):
    config = tiny_config(voc, tmp_path, method="tract")
    model = build_model("faster_rcnn_vgg16", 2, width=8, hidden=16)
    build(config.method).apply(model)
    assert isinstance(model.backbone[0], TrActConv2d)
    assert sum(isinstance(module, TrActConv2d) for module in model.modules()) == 1


def test_a_stopped_run_ends_as_an_undisturbed_one(voc, tmp_path, monkeypatch):
    changes = {"method": "tract", "epochs": 2, "batch_size": 2, "micro_batch": 1}
    expected = run(tiny_config(voc, tmp_path / "a", **changes))
    assert expected["steps"] == 6
    assert 0 <= expected["metrics"]["test/map"] <= 100
    calls = iter(range(100))
    monkeypatch.setattr(StopRequest, "wish", lambda self: Wish.STOP if next(calls) == 3 else Wish.GO_ON)
    with pytest.raises(StoppedError):
        run(tiny_config(voc, tmp_path / "b", **changes))
    result = run(tiny_config(voc, tmp_path / "b", **changes))
    assert result["attempts"] == 2
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert result["metrics"] == expected["metrics"]


def test_a_detectors_loss_falls_and_its_command_ends_with_its_map(voc, tmp_path, capsys):
    """From random weights, on six pictures of plain rectangles."""
    words = [f"{key}={'null' if value is None else value}" for key, value in TINY.items()]
    words += [f"data.root={voc}", f"runtime.runs={tmp_path}", "epochs=12", "eval_every=12", "runtime.log_every=6"]
    assert main("detection_voc", "", "", [*words, "method=tract", "optim=adam", "optim.lr=0.001"]) == 0
    assert "finished: test/map " in capsys.readouterr().out
    (folder,) = (tmp_path / "detection_voc").glob("voc2007-*")
    log = EventAccumulator(str(folder)).Reload()
    losses = {name: [e.value for e in log.Scalars(f"train/{name}")] for name in ("loss", *Detection.measures)}
    np.testing.assert_allclose(losses.pop("loss"), np.sum(list(losses.values()), axis=0), rtol=1e-5)
    assert losses["loss_classifier"][-1] < 0.5 * losses["loss_classifier"][0]
