"""TensorBoard tags: what the x axis of each counts, and which one runs are known by."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import folder_of
from experiments.training.run import run
from runfolder import tags
from runfolder.records import disagreeing, read_result
from tests.cases import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, points by tag as TensorBoard reads them) of a run of two epochs."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), epochs=2)
    run(config)
    folder = folder_of(config)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return folder, {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if not tag.startswith("_")}


def test_training_logs_each_tag_at_what_its_axis_counts(trained):
    folder, points = trained
    steps = json.loads(folder.result.read_text())["steps"]
    assert steps > 4
    for tag, own in points.items():
        last = own[-1].step
        assert (last, tags.counts_steps(tag)) in ((2, False), (steps - 1, True), (steps, True)), tag
    assert {tags.axis(tag) for tag in points} == {"step", "epoch"}
    assert {tags.LOSS, tags.LEARNING_RATE, tags.TOP1, tags.EPOCH_SECONDS, tags.IMAGES_PER_SECOND} <= points.keys()


def test_a_run_says_the_same_in_its_events_and_in_its_result(trained):
    folder, points = trained
    metrics = read_result(folder)["metrics"]
    final = {tag: next((point.value for point in points[tag] if point.step == 2), None) for tag in metrics}
    assert any(map(tags.is_test, metrics))
    assert disagreeing(metrics, final) == []
    for tag in filter(tags.is_test, metrics):
        assert disagreeing(metrics, final | {tag: final[tag] + 0.01}) == [tag]
        assert disagreeing(metrics, {key: value for key, value in final.items() if key != tag}) == [tag]


def test_a_run_names_the_metric_that_it_is_known_by(trained):
    folder, points = trained
    assert tags.primary_metric(read_result(folder)) in points


@pytest.mark.parametrize("tag", ["train/loss", "train/lr", "train/test/x"])
def test_what_training_measures_counts_steps(tag):
    assert (tags.axis(tag), tags.counts_steps(tag), tags.is_test(tag)) == ("step", True, False)


@pytest.mark.parametrize(("tag", "test"), [("test/top1", True), ("ema/top1", False), ("time/epoch_seconds", False)])
def test_what_an_evaluation_measures_counts_epochs(tag, test):
    assert (tags.axis(tag), tags.counts_steps(tag), tags.is_test(tag)) == ("epoch", False, test)


def test_less_is_better_of_losses_times_and_memory():
    less = [tags.LOSS, "test/loss", "test/error", tags.EPOCH_SECONDS, tags.PEAK_MIB]
    more = [tags.TOP1, "test/top5", "test/map", tags.IMAGES_PER_SECOND]
    assert [tags.smaller_is_better(tag) for tag in less + more] == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ([], "test/top1"),
        ([None, {}, {"primary_metric": 5}], "test/top1"),
        ([{"primary_metric": "test/map"}], "test/map"),
        ([{"primary_metric": "a"}, None, {"primary_metric": "b"}, {"primary_metric": "b"}, {}, {}, {}], "b"),
    ],
)
def test_runs_are_known_by_what_most_of_their_results_name(named, known):
    assert tags.primary_metric(*named) == known
