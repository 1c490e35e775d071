"""Detection: VOC's average precision, boxes, Faster R-CNN's weights, and whole runs."""

import multiprocessing
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.detection import MeanAveragePrecision

from experiments import cli
from experiments.config import build, compose_config
from experiments.errors import UserError
from experiments.models import build_model
from experiments.training.average_precision import (
    RECALLS,
    ImageResult,
    average_precision,
    intersection_over_union,
    mean_average_precision,
)
from experiments.training.boxes import BoxSamples, mirrored, voc2007
from experiments.training.data import Batches, fingerprint
from experiments.training.detection import Detection
from experiments.training.folder import folder_of
from experiments.training.loop import StoppedError
from experiments.training.parallel import Ranks
from experiments.training.run import run
from experiments.training.stop import StopRequest, Wish
from tests.voc_folder import CLASSES, write_voc
from tract import TrActConv2d

CPU = torch.device("cpu")
TINY = {
    "model.width": 8, "model.hidden": 16, "model.min_size": 64, "model.max_size": 96, "start_from": None,
    "runtime.workers": 0, "runtime.progress": False, "runtime.threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"), train=6, test=5)


def tiny_config(voc, runs, **changes):
    return compose_config("detection_voc", TINY | {"data.root": str(voc), "runtime.runs": str(runs)} | changes)


# -- average precision ------------------------------------------------------------------------------


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


# -- data -------------------------------------------------------------------------------------------


def test_boxes_surround_the_pixels_that_were_pasted(voc):
    data = voc2007(str(voc), flip=True)
    assert data.classes == list(CLASSES)
    assert (len(data.train), len(data.test)) == (6, 5)
    draws = []
    for epoch in (None, 0, 1, 2):
        for image, target in BoxSamples(data, 0, 1).__getitems__(("train", epoch, list(range(6)))):
            for (left, top, right, bottom), label in zip(target["boxes"].int(), target["labels"], strict=True):
                inside = image[:, top + 2 : bottom - 2, left + 2 : right - 2].float().mean()
                assert inside < 60 if label == 1 else inside > 200
                around = image.float().mean(0)
                assert bool(around[top + 2 : bottom - 2, right + 1 : right + 2].sub(128).abs().lt(40).all())
            draws.append(image)
    plain, *epochs = (draws[6 * k : 6 * k + 6] for k in range(4))
    flips = {tuple(not torch.equal(a, b) for a, b in zip(plain, own, strict=True)) for own in epochs}
    assert len(flips) > 1, "epochs differ in what they mirror"


def test_mirroring_twice_changes_nothing():
    boxes = torch.tensor([[0.0, 1.0, 5.0, 6.0], [3.0, 0.0, 10.0, 2.0]])
    assert mirrored(boxes, 10).tolist() == [[5.0, 1.0, 10.0, 6.0], [0.0, 0.0, 7.0, 2.0]]
    assert torch.equal(mirrored(mirrored(boxes, 10), 10), boxes)


def test_batches_do_not_depend_on_who_loads_them(voc):
    data = voc2007(str(voc), flip=True)
    options = {"seed": 3, "batch_size": 4, "drop_last": False, "overfit": None, "eval_batch_size": 2, "device": CPU}
    whole = [list(Batches(data, workers=n, ranks=Ranks(), **options).train(1)) for n in (0, 2)]
    halves = [list(Batches(data, workers=0, ranks=Ranks(r, 2), **options).train(1)) for r in (0, 1)]
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*halves, strict=True)]
    for other in (whole[1], joined):
        for (images, targets), (theirs, their_targets) in zip(whole[0], other, strict=True):
            assert all(map(torch.equal, images, theirs))
            for mine, its in zip(targets, their_targets, strict=True):
                assert all(torch.equal(mine[key], its[key]) for key in mine)


def test_two_data_sets_have_two_fingerprints(voc, tmp_path):
    again = write_voc(tmp_path, train=6, test=5)
    first, second = (voc2007(str(root), flip=True) for root in (voc, again))
    assert fingerprint(first) == fingerprint(second)
    path = again / "VOCdevkit" / "VOC2007" / "Annotations" / "test0002.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    assert fingerprint(voc2007(str(again), flip=True)) != fingerprint(first)


BAD = {
    "no annotation": ("Annotations/test0001.xml", None, "expected an annotation of VOC in .*test0001.xml, got"),
    "half a file": ("Annotations/test0001.xml", "<annotation><object>", "test0001.xml, got: no element found"),
    "outside": ("Annotations/test0001.xml", ("<xmin>1<", "<xmin>0<"), r"test0001.xml, got: the box 0 "),
    "no picture": ("JPEGImages/test0001.jpg", None, "all 11 listed images in .*, 1 are missing, such as test0001.jpg"),
    "only in test": ("Annotations/test0001.xml", ("light", "odd"), r"got only in test: \['odd'\]"),
    "nothing": ("ImageSets/Main/test.txt", "", "expected images in .*test.txt, got none"),
}


def test_an_object_without_a_side_is_named(tmp_path):
    path = write_voc(tmp_path, train=2, test=2) / "VOCdevkit" / "VOC2007" / "Annotations" / "test0001.xml"
    path.write_text(re.sub("<ymax>[0-9]+</ymax>", "", path.read_text()))
    with pytest.raises(UserError, match=r"test0001.xml, got: an object without ymax; unpack"):
        voc2007(str(tmp_path), flip=True)


def test_a_loader_process_keeps_no_file_open_for_what_it_has_sent(tmp_path):
    """Each tensor of the data set that is sent as it stands would stay in shared memory, with an open file."""
    data = voc2007(str(write_voc(tmp_path, train=80, test=1)), flip=True)
    options = {"seed": 0, "batch_size": 1, "drop_last": False, "overfit": None, "eval_batch_size": 1, "device": CPU}
    batches = Batches(data, workers=1, ranks=Ranks(), **options)
    for _ in batches.train(0):
        (worker,) = multiprocessing.active_children()
        open_files = len(list(Path(f"/proc/{worker.pid}/fd").iterdir()))
    batches.close()
    assert open_files < 80


def test_a_home_directory_is_found(voc, monkeypatch):
    monkeypatch.setenv("HOME", str(voc.parent))
    assert len(voc2007(f"~/{voc.name}", flip=True).train) == 6


def test_fewer_images_in_a_batch_than_ranks_are_refused(voc):
    options = {"seed": 0, "drop_last": False, "overfit": None, "eval_batch_size": 1, "workers": 0, "device": CPU}
    with pytest.raises(UserError, match="expected batch_size to have an image for each of 2 ranks, got 1"):
        Batches(voc2007(str(voc), flip=True), batch_size=1, ranks=Ranks(0, 2), **options)


@pytest.mark.parametrize("case", BAD)
def test_damaged_data_are_named(case, tmp_path):
    name, change, sentence = BAD[case]
    path = write_voc(tmp_path, train=6, test=5) / "VOCdevkit" / "VOC2007" / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else path.read_text().replace(*change))
    with pytest.raises(UserError, match=sentence):
        voc2007(str(tmp_path), flip=True)


def test_without_data_and_network_it_says_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=r"got: no network. Offline: unpack VOCtrainval_06-Nov-2007.tar and"):
        voc2007(str(tmp_path), flip=True)


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
    file |= {f"classifier.{i}.{kind}": torch.randn_like(own[f"roi_heads.box_head.{i + 1}.{kind}"])
             for i in (0, 3) for kind in ("weight", "bias")}  # fmt: skip
    torch.save(file, tmp_path / "vgg.pth")
    config = tiny_config(voc, tmp_path, start_from=str(tmp_path / "vgg.pth"), max_steps=1, **{"optim.lr": 1e-30})
    run(config)
    trained = torch.load(next(folder_of(config).glob("checkpoints/*.pt")), weights_only=True)["model"]
    assert torch.equal(trained["backbone.2.weight"], file["features.2.weight"])
    assert torch.equal(trained["roi_heads.box_head.4.bias"], file["classifier.3.bias"])
    assert "fresh: rpn.head.conv.0.0.weight" in (folder_of(config) / "log.txt").read_text()


# -- runs -------------------------------------------------------------------------------------------


def test_perfect_answers_are_100_percent_and_moved_ones_0(voc):
    data = voc2007(str(voc), flip=True)
    task, options = Detection(compose_config("detection_voc", {}), data), {"overfit": None, "eval_batch_size": 2}
    batches = Batches(data, seed=0, batch_size=1, drop_last=False, workers=0, ranks=Ranks(), device=CPU, **options)

    def score(shift):
        truth = iter([target for _, targets in batches.test() for target in targets])
        answers = lambda images: [  # noqa: E731
            {"boxes": t["boxes"] + shift, "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
            for t in (next(truth) for _ in images)
        ]
        return task.evaluate(answers, batches.test(), Ranks(), lambda: None)["map"]

    assert score(0) == pytest.approx(100)
    assert score(1000) == 0


def test_the_loss_is_the_networks_on_the_objects_that_count(voc):
    data = voc2007(str(voc), flip=False)
    task = Detection(compose_config("detection_voc", {}), data)
    samples = BoxSamples(data, 0, 1)
    images, targets = samples.ready(samples.collate(samples.__getitems__(("train", None, [0, 1, 2, 3]))), CPU)
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
    assert cli.main("detection_voc", "", "", [*words, "method=tract", "optim=adam", "optim.lr=0.001"]) == 0
    assert "finished: test/map " in capsys.readouterr().out
    (folder,) = (tmp_path / "detection_voc").glob("voc2007-*")
    log = EventAccumulator(str(folder)).Reload()
    losses = {name: [e.value for e in log.Scalars(f"train/{name}")] for name in ("loss", *Detection.measures)}
    np.testing.assert_allclose(losses.pop("loss"), np.sum(list(losses.values()), axis=0), rtol=1e-5)
    assert losses["loss_classifier"][-1] < 0.5 * losses["loss_classifier"][0]
