"""Images with boxes: read as VOC has them, and the same bytes for whoever loads them."""

import multiprocessing
import re
from pathlib import Path

import pytest
import torch
import torchvision

from experiments.data.batches import Batches, fingerprint
from experiments.data.boxes import BoxSamples, mirrored
from experiments.ranks import Ranks
from runfolder.errors import UserError
from tests.voc_folder import CLASSES, voc2007, write_voc

CPU = torch.device("cpu")


def test_boxes_surround_the_pixels_that_were_pasted(voc):
    data = voc2007(str(voc), flip=True)
    assert data.classes == list(CLASSES)
    assert (len(data.train), len(data.test)) == (6, 5)
    draws = []
    for epoch in (None, 0, 1, 2):
        for image, target in zip(*BoxSamples(data, 0, 1)["train", epoch, list(range(6))], strict=True):
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
    before = set(multiprocessing.active_children())
    for _ in batches.train(0):
        (worker,) = set(multiprocessing.active_children()) - before
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
