"""What is wrong with a run folder is said, in one sentence with the folder and a cure."""

import builtins
import io
import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from analysis import events, load
from analysis.costs import device_hours
from analysis.identity import begun_with, recorded
from analysis.load import Problem, Status, load_run, load_runs
from experiments import config as training
from experiments.training.log import RunLog
from runfolder.errors import UserError
from runfolder.folder import RunFolder
from runfolder.naming import hash_in
from tests.run_folders import ATTEMPT, configuration, curve, event_file, record_offsets, write_hparams, write_run


@pytest.fixture
def good(tmp_path):
    return write_run(tmp_path, configuration(), curve(0, "vanilla"))


def _only_problem(folder, *words, spoils=True):
    run = load_run(folder)
    (problem,) = run.problems
    assert problem.text.startswith(f"{folder}: ")
    assert problem.text.endswith(".")
    assert "\n" not in problem.text
    for word in words:
        assert word in problem.text
    assert problem.spoils == spoils
    assert run.usable == (not spoils)
    return run


def _rewrite(path, **changes):
    content = yaml.safe_load(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def _log(folder, epoch, value):
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("test/top1", value, epoch)


def test_a_good_run_has_no_problem(good):
    run = load_run(good)
    assert (run.status, run.problems, run.usable) == (Status.finished, (), True)
    assert (run.seed, run.last_epoch, run.final_epoch) == (0, 5, 5)
    assert run.final_value("test/top1") == pytest.approx(curve(0, "vanilla")[-1], rel=1e-6)
    assert run.final_value("train/loss") == pytest.approx(1 / 50)
    assert run.final_value("test/absent") is None


def test_unfinished_says_the_last_epoch_and_the_command(tmp_path):
    folder = write_run(tmp_path, configuration(), curve(0, "vanilla")[:3], finished=False)
    run = _only_problem(folder, "unfinished", "epoch 3 of 5", f"`python experiments/demo.py --resume {folder}`")
    assert run.status == Status.unfinished


def test_failed_says_why(tmp_path):
    failure = {"kind": "non-finite", "reason": "the loss is nan\nin train", "step": 17}
    folder = write_run(tmp_path, configuration(), [70.0], finished=False, failure=failure)
    assert _only_problem(folder, "failed at step 17", "the loss is nan in train", "--resume").status == Status.failed


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "seed: one\nepochs: 5\n", "seed: 1\nepochs: 0\n", "\x00"])
def test_an_unusable_config_is_named(good, text):
    (good / "config.yaml").write_text(text)
    assert _only_problem(good, "config.yaml").config is None


def test_a_missing_config_is_named(good):
    (good / "config.yaml").unlink()
    _only_problem(good, "config.yaml is missing", "restore it")


def test_a_config_without_a_method_is_named(good):
    _rewrite(good / "config.yaml", method={"lambda_": 0.1})
    _only_problem(good, "names no method")


@pytest.mark.parametrize("name", ["provenance.json", "failure.json"])
def test_an_unreadable_side_file_is_named_but_spoils_nothing(good, name):
    (good / name).write_text("{")
    _only_problem(good, name, spoils=False)


def test_missing_provenance_is_named(good):
    (good / "provenance.json").unlink()
    _only_problem(good, "commit and versions are unknown", spoils=False)


def test_an_unreadable_result_spoils_the_run(good):
    (good / "result.json").write_text("")
    assert _only_problem(good, "result.json cannot be read").status == Status.finished


def test_a_leftover_failure_is_named(good):
    (good / "failure.json").write_text('{"kind": "non-finite"}')
    _only_problem(good, "both result.json and failure.json", spoils=False)


def test_finished_without_events_is_named(good):
    event_file(good).unlink()
    _only_problem(good, "finished, but without events")


def test_event_files_in_a_subfolder_are_named(good):
    _log(good / "deep" / "down", 5, 12.0)
    run = _only_problem(good, "event files in deep/down are not read", "move them up", spoils=False)
    assert run.final_value("test/top1") == pytest.approx(curve(0, "vanilla")[-1])


def test_a_run_with_all_its_events_in_a_subfolder_is_not_to_be_deleted(good):
    (good / "sub").mkdir()
    event_file(good).rename(good / "sub" / event_file(good).name)
    without, below = load_run(good).problems
    assert without == Problem(f"{good}: finished, but without events; move up those in its subfolders.", spoils=True)
    assert "event files in sub are not read" in below.text


def test_a_truncated_event_file_is_named_at_every_byte_of_its_last_record(good):
    path = event_file(good)
    content, start = path.read_bytes(), record_offsets(path)[-2]
    for size in range(start, len(content)):
        path.write_bytes(content[:size])
        run = load_run(good)
        assert not run.usable
        damaged = any(f"{path.name}, byte {start}: " in problem.text for problem in run.problems)
        assert damaged == (size > start)
        assert any("test/loss is missing at epoch 5" in problem.text for problem in run.problems)


def test_a_flipped_bit_is_named_with_file_and_byte(good):
    path = event_file(good)
    content, start = bytearray(path.read_bytes()), record_offsets(path)[-2]
    content[start + 20] ^= 4
    path.write_bytes(content)
    assert f"damaged event file {path.name}, byte {start}" in load_run(good).problems[0].text


def test_duplicate_epochs_are_named_and_the_last_is_used(tmp_path):
    folder = write_run(tmp_path, configuration(), curve(0, "vanilla"))
    _log(folder, 2, 12.5)
    words = ("duplicate", "test/top1", "at epoch 2; the last of each is taken as the point")
    run = _only_problem(folder, *words, spoils=False)
    assert run.curve("test/top1")[2] == 12.5


def test_missing_epochs_are_named(tmp_path):
    folder = write_run(tmp_path, configuration(epochs=3), [], result={"metrics": {"test/top1": 52.0}})
    for epoch, value in ((1, 50.0), (3, 52.0)):
        _log(folder, epoch, value)
    _only_problem(folder, "test/top1 is missing at epoch 2", spoils=False)


def test_a_missing_final_epoch_spoils_the_run(tmp_path):
    folder = write_run(tmp_path, configuration(epochs=3), curve(0, "vanilla")[:2], result={"metrics": {}})
    run = load_run(folder)
    assert not run.usable
    assert run.final_value("test/top1") is None


def test_epochs_beyond_the_end_spoil_the_run(tmp_path):
    folder = write_run(tmp_path, configuration(epochs=4), curve(0, "vanilla"), result={"metrics": {}})
    assert "epoch 5 outside 1 to 4" in load_run(folder).problems[0].text
    assert not load_run(folder).usable


@pytest.fixture
def little_memory():
    """Half a GiB more than is in use, so that a test that fails does not take the machine with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("step", [10, 10**12, 2**62])
@pytest.mark.parametrize(("state", "more"), [("unfinished", {}), ("finished", {}), ("finished", {"max_steps": 30})])
def test_a_stray_step_is_named_and_counted_up_to_by_nobody(tmp_path, little_memory, state, more, step):
    config = configuration(epochs=9 if more else 3, **more)
    folder = write_run(tmp_path, config, curve(0, "vanilla", 3), finished=state == "finished")
    _log(folder, step, 1.0)
    _log(folder, 0, 1.0)
    run = load_run(folder)
    *before, named = run.problems
    assert f"test/top1 has epoch 0 and {step} outside 1 to {config['epochs']};" in named.text
    assert (len(before), run.usable, run.last_epoch) == (state == "unfinished", False, 3)


def test_a_run_of_nothing_but_stray_steps_has_no_last_epoch(tmp_path):
    folder = write_run(tmp_path, configuration(), [], finished=False)
    _log(folder, 6, 1.0)
    run = load_run(folder)
    assert ["last evaluated epoch 0 of 5" in run.problems[0].text, len(run.problems), run.last_epoch] == [True, 2, 0]


@pytest.mark.parametrize("epochs", [10**6 + 1, 10**15])
def test_more_epochs_than_can_be_counted_are_refused(good, little_memory, epochs):
    _rewrite(good / "config.yaml", epochs=epochs)
    _only_problem(good, "config.yaml has more than 1000000 as epochs")


@pytest.mark.parametrize(("every", "epochs"), [(2, (2, 4, 5)), (3, (3, 5)), (9, (5,))])
def test_less_frequent_evaluation_is_no_gap(tmp_path, every, epochs):
    folder = write_run(tmp_path, configuration(eval_every=every), [], result={"metrics": {"test/top1": 5.0}})
    for epoch in epochs:
        _log(folder, epoch, float(epoch))
    assert load_run(folder).problems == ()
    assert load_run(folder).final_value("test/top1") == 5.0


def test_a_run_ended_by_max_steps_is_whole_if_it_agrees_with_its_result(tmp_path):
    config = configuration(epochs=9, max_steps=30)
    folder = write_run(tmp_path, config, curve(0, "vanilla", 3))
    assert load_run(folder).problems == ()
    _rewrite(folder / "result.json", metrics={"test/top1": 1.0})
    _only_problem(folder, "final test/top1")


def test_a_final_value_that_differs_from_the_result_is_named(good):
    _rewrite(good / "result.json", metrics={"test/top1": curve(0, "vanilla")[-1] + 0.01})
    _only_problem(good, "final test/top1 is", "in result.json")


@pytest.mark.parametrize("value", [str(curve(0, "vanilla")[-1]), None, True, [1.0], {}])
def test_a_final_value_that_is_no_number_is_named(good, value):
    _rewrite(good / "result.json", metrics={"test/top1": value})
    _only_problem(good, "final test/top1 is", f"but {json.dumps(value)} in result.json")


@pytest.mark.parametrize("content", [{}, {"metrics": {}}, {"metrics": 5}, {"metrics": {"train/loss": 1.0}}])
def test_a_result_that_confirms_nothing_is_named(good, tmp_path, content):
    (good / "result.json").write_text(json.dumps(content))
    _only_problem(good, "no test/* metric to compare the events with; restore it", spoils=False)
    folder = write_run(tmp_path / "ended", configuration(epochs=9, max_steps=30), curve(0, "vanilla", 3))
    (folder / "result.json").write_text(json.dumps(content))
    _only_problem(folder, "alone says where max_steps ended the run")


def test_points_in_the_middle_that_are_not_finite_are_named(tmp_path):
    values = [70.0, math.inf, math.nan, 71.0, 72.0]
    folder = write_run(tmp_path, configuration(), values)
    loss, top1 = load_run(folder).problems
    assert f"{folder}: test/top1 is inf or nan at epoch 2 and 3; " in top1.text
    assert f"{folder}: test/loss is -inf or nan at epoch 2 and 3; " in loss.text
    assert load_run(folder).usable


def test_a_final_point_that_is_not_finite_is_named_by_the_table_alone(tmp_path):
    assert load_run(write_run(tmp_path, configuration(), [70.0] * 4 + [math.nan])).problems == ()


def test_one_tag_alone_may_be_confirmed(good):
    _rewrite(good / "result.json", metrics={"test/loss": 1 - curve(0, "vanilla")[-1] / 100, "test/other": "x"})
    assert load_run(good).problems == ()


def test_a_result_of_another_length_is_named(good):
    _rewrite(good / "result.json", epochs=6)
    _only_problem(good, "result.json says 6 epochs, config.yaml 5")


# -- a folder of two runs ----------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"seed": 1}, {"method": {"name": "tract"}}, {"epochs": 6}, {"optim": {"lr": 0.2}}])
def test_a_config_changed_after_the_start_spoils_the_run(tmp_path, change):
    folder = write_run(tmp_path, configuration(), curve(0, "vanilla"), result={"epochs": change.get("epochs", 5)})
    write_hparams(folder, configuration())
    assert not any("was begun with" in problem.text for problem in load_run(folder).problems)
    _rewrite(folder / "config.yaml", **change)
    assert "was begun with" in load_run(folder).problems[0].text
    assert not load_run(folder).usable


def test_a_run_under_another_experiment_is_named_with_its_place(tmp_path):
    good = tmp_path / "demo" / "run"
    shutil.copytree(write_run(tmp_path / "elsewhere", configuration(), curve(0, "vanilla"), experiment="other"), good)
    _only_problem(good, "says experiment other", "under demo", f"move it to {good.parents[1]}/other/")
    moved = good.parents[1] / "other" / good.name
    moved.parent.mkdir()
    good.rename(moved)
    assert load_run(moved).problems == ()


def test_a_config_without_an_experiment_is_of_any(good):
    content = yaml.safe_load((good / "config.yaml").read_text())
    del content["experiment"]
    (good / "config.yaml").write_text(yaml.safe_dump(content))
    _rewrite(good / "result.json", config_hash=None)
    assert load_run(good.rename(good.with_name("small"))).problems == ()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"method": {"name": "tract"}}, {"experiment": "other"}, {"data": None}, {"at": [b"\0"]}]
)
def test_a_config_that_its_hash_is_not_of_spoils_the_run_in_one_sentence(good, named, change):
    folder = good if named else good.rename(good.with_name("small"))  # result.json still knows the hash
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(content | change))
    _only_problem(folder, "config.yaml is of another configuration than the run", f"the run's {hash_in(good.name)}")


def test_where_code_lies_and_what_the_machine_is_are_no_change(good):
    content = yaml.safe_load((good / "config.yaml").read_text())
    content["model"]["_target_"] = "elsewhere.Small"
    content["data"]["root"] = content["runtime"]["data_dir"] = "/another/disk"
    (good / "config.yaml").write_text(yaml.safe_dump(content))
    assert load_run(good).problems == ()


def test_another_machines_runtime_is_no_change(good):
    _rewrite(good / "config.yaml", runtime={"workers": 9, "data_dir": "data"})
    assert load_run(good).problems == ()


def test_the_result_of_another_run_is_named(good):
    _rewrite(good / "result.json", config_hash="01234567")
    _only_problem(good, "different configurations", "01234567 in result.json", f"{good.name[-8:]} in the folder's name")


@pytest.mark.parametrize("words", ["seed=3", "method=tract", "--resume runs/demo/small-vanilla-s3-01234567"])
def test_an_attempt_of_another_run_spoils_the_run(tmp_path, words):
    attempts = [ATTEMPT, ATTEMPT | {"command": f"python experiments/demo.py {words}"}]
    folder = write_run(tmp_path, configuration(), curve(0, "vanilla"), attempts=attempts)
    _only_problem(folder, "an attempt of another run, method or seed", words)


@pytest.mark.parametrize("words", ["seed=0 method=tract method.lambda_=1e-1", "seed=0,1 method=tract,vanilla", "'"])
def test_an_attempt_that_says_what_the_run_is_is_no_problem(tmp_path, words):
    config = configuration(method={"name": "tract", "lambda_": 0.1})
    attempts = [ATTEMPT | {"command": f"python experiments/demo.py {words}"}]
    folder = write_run(tmp_path, config, curve(0, "tract"), attempts=attempts)
    resumed = ATTEMPT | {"command": f"python experiments/demo.py --resume elsewhere/{folder.name}/"}
    (folder / "provenance.json").write_text(json.dumps({"attempts": [*attempts, resumed]}))
    assert load_run(folder).problems == ()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (configuration(seed=3), "seed=3 instead of 0"),
        (configuration(method={"name": "tract", "lambda_": 0.1}), "method.name=tract instead of vanilla"),
        (configuration(lr=0.2), "optim.lr=0.2 instead of 0.1"),
    ],
)
def test_events_of_another_run_spoil_the_run(good, other, words):
    write_hparams(good, other)
    _only_problem(good, "was begun with", words)


def test_events_of_the_same_run_on_another_machine_are_no_problem(good):
    config = configuration()
    config["runtime"]["workers"], config["data"]["root"] = 7, "/elsewhere"
    write_hparams(good, config)
    assert load_run(good).problems == ()


def test_an_event_file_begins_with_what_training_wrote(tmp_path):
    config = training.to_tree(training.compose_config("cifar_vit", {"method": "tract"}))
    write_hparams(tmp_path, config)
    assert begun_with(event_file(tmp_path)) == recorded(config)
    assert begun_with(tmp_path / "absent") == {}


def test_submission_folders_are_not_runs(tmp_path, good):
    (tmp_path / "demo" / "slurm" / "123").mkdir(parents=True)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "empty").mkdir()
    assert {name: [run.folder.path for run in runs] for name, runs in load_runs(tmp_path).items()} == {"demo": [good]}


def test_an_empty_run_folder_is_not_dropped(tmp_path, good):
    (tmp_path / "demo" / "broken").mkdir()
    run = load_runs(tmp_path)["demo"][0]
    assert (run.folder.name, run.config, run.status) == ("broken", None, Status.unfinished)


@pytest.mark.parametrize(
    ("root", "experiment", "sentence"),
    [
        ("absent", None, "not one"),
        (".", "demmo", "nearest: demo"),
        ("demo", None, "holds runs"),
        ("none", None, "none"),
    ],
)
def test_a_wrong_folder_or_name_is_one_sentence(tmp_path, good, root, experiment, sentence):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=sentence) as caught:
        load_runs(tmp_path / root, experiment)
    assert "\n" not in str(caught.value)


def test_a_moved_copy_reads_the_same(tmp_path, good):
    copy = tmp_path / "demo" / "copy"
    shutil.copytree(good, copy)
    assert load_run(copy).curve("test/top1") == load_run(good).curve("test/top1")


def _train_as_we_do(folder, seed):
    """Two attempts of a run: the second cuts the record back to the checkpoint of the first."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(seed=seed)))
    hyper_parameters = {"seed": seed, "method.name": "tract", "optim.lr": 0.1, "optim.nesterov": True}
    log, sizes = RunLog(RunFolder(folder)), {}
    log.begin(sizes, hyper_parameters, "test/top1")
    for epoch in (1, 2, 3):
        for step in range(10 * epoch - 10, 10 * epoch):
            log.scalar("train/loss", 1 / (step + 1), step)
        log.scalar("test/top1", 60.0 + epoch + seed, epoch)
        sizes = log.sizes() if epoch == 2 else sizes
    log.close()
    log = RunLog(RunFolder(folder))
    log.begin(sizes, hyper_parameters, "test/top1")
    for epoch in (3, 4, 5):
        log.scalar("test/top1", 70.0 + epoch + seed, epoch)
    log.close()


@pytest.fixture
def trained(tmp_path):
    for seed in (0, 1):
        _train_as_we_do(tmp_path / "runs" / "demo" / f"s{seed}", seed)
    write_run(tmp_path / "runs", configuration(seed=2), curve(2, "vanilla"))
    return tmp_path / "runs"


def _opened_by_tensorboard(root):
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    multiplexer.AddRunsFromDirectory(str(root))
    multiplexer.Reload()
    return multiplexer


def _scalars(multiplexer, name):
    tags = multiplexer.PluginRunToTagToContent("scalars")[name]
    points = {tag: multiplexer.Tensors(name, tag) for tag in tags}
    return {tag: [(e.step, make_ndarray(e.tensor_proto).item(), e.wall_time) for e in points[tag]] for tag in tags}


def _accumulated(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    points = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    return {tag: [(e.step, e.value, e.wall_time) for e in points[tag]] for tag in points}


def test_tensorboard_shows_the_points_that_we_read_each_once(trained):
    multiplexer = _opened_by_tensorboard(trained)
    runs = load_runs(trained)["demo"]
    assert set(multiplexer.Runs()) == {f"demo/{run.folder.name}" for run in runs}
    for run in runs:
        series = run.events.series
        own = {tag: list(zip(s.steps, s.values, s.wall_times, strict=True)) for tag, s in series.items()}
        assert _scalars(multiplexer, f"demo/{run.folder.name}") == own
        assert _accumulated(run.folder) == own
        assert all(points.repeated_steps() == [] for points in series.values())
    assert runs[0].curve("test/top1") == {1: 61.0, 2: 62.0, 3: 73.0, 4: 74.0, 5: 75.0}


def test_tensorboard_lists_hyper_parameters_and_the_final_accuracy(trained):
    provider = MultiplexerDataProvider(_opened_by_tensorboard(trained), str(trained))
    backend = backend_context.Context(TBContext(data_provider=provider, logdir=str(trained)))
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN],
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(tag="test/top1"))],
    )
    answer = list_session_groups.Handler(RequestContext(), backend, "", request).run()
    assert answer.total_size == 2
    for seed, group in enumerate(sorted(answer.session_groups, key=lambda group: group.name)):
        assert group.name == f"demo/s{seed}"
        assert len(group.sessions) == 1
        assert {name: value.WhichOneof("kind") for name, value in group.hparams.items()} == {
            "seed": "number_value",
            "method.name": "string_value",
            "optim.lr": "number_value",
            "optim.nesterov": "number_value",  # torch writes yes as 1
        }
        assert group.hparams["seed"].number_value == seed
        assert [(m.name.tag, m.value, m.training_step) for m in group.metric_values] == [("test/top1", 75.0 + seed, 5)]


def test_a_record_too_large_to_be_read_is_named(good, monkeypatch):
    monkeypatch.setattr(events, "LARGEST", 20)
    monkeypatch.setattr(events.RecordReader.__init__, "__defaults__", (16,))
    (named,) = [problem for problem in load_run(good).problems if "a record of more than" in problem.text]
    assert f"{event_file(good).name}, byte 0: " in named.text
    assert "others" in named.text
    assert not named.spoils


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "[" * 8000, "seed: 2001-99-99"])
def test_a_config_that_yaml_stumbles_over_is_named(good, text):
    (good / "config.yaml").write_text(text)
    _only_problem(good, "config.yaml cannot be read")


@pytest.mark.parametrize("text", ["z: &a {b: *a}", "z: &a [*a]", "z: &a [{b: [*a]}]"])
def test_a_config_that_holds_itself_is_named(good, text):
    with open(good / "config.yaml", "a") as file:
        file.write(f"{text}\n")
    _only_problem(good, "config.yaml cannot be read")


@pytest.mark.parametrize("change", [{"seed": 10**400}, {"optim": {"lr": -(10**400)}}, {"z": [{"a": [10**309]}]}])
def test_a_config_with_a_number_beyond_all_floats_is_named(good, change):
    content = yaml.safe_load((good / "config.yaml").read_text())
    (good / "config.yaml").write_text(yaml.safe_dump(content | change))
    _only_problem(good, "config.yaml has a whole number beyond 1.8e+308")


@pytest.mark.parametrize(
    ("name", "content", "spoils"),
    [
        ("result.json", {"metrics": {"test/top1": 10**400}}, True),
        ("result.json", {"seconds": 10**400}, True),
        ("provenance.json", {"attempts": [{"world_size": 10**400}]}, False),
    ],
)
def test_json_with_a_number_beyond_all_floats_is_named(good, name, content, spoils):
    (good / name).write_text(json.dumps(content))
    run = _only_problem(good, f"{name} has a whole number beyond 1.8e+308", spoils=spoils)
    assert device_hours(run) is None


def test_json_that_is_nested_without_end_is_named(good):
    (good / "result.json").write_text("[" * 100_000)
    _only_problem(good, "result.json cannot be read")


@pytest.mark.parametrize("comment", ["", "# *: which the fast loader is not trusted with\n"])
def test_both_loaders_of_configurations_say_the_same(good, comment):
    text = "seed: 3\nepochs: 5\nmethod: {name: m, lr: 1e-3, on: yes, at: 2001-01-01, none: ~, o: 010, x: .inf}\n"
    (good / "config.yaml").write_text(comment + text)
    assert load_run(good).config == yaml.safe_load(text)


def test_a_bar_is_drawn_on_a_terminal_only(good, monkeypatch, capsys):
    bar = load.tqdm
    monkeypatch.setattr(load, "tqdm", lambda *given, **options: bar(*given, **options | {"delay": 0}))
    load_runs(good.parents[1])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_runs(good.parents[1])
    assert "reading" in capsys.readouterr().err


@pytest.fixture
def locked(good, monkeypatch):
    """A run folder that nobody may look into, also where the tests run as root."""

    def refuse(call):
        def guarded(path, *given, **options):
            if not isinstance(path, int) and str(path).startswith(str(good)) and str(path) != str(good):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *given, **options)

        return guarded

    for module, name in ((os, "stat"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, name, refuse(getattr(module, name)))
    return good


def test_a_run_folder_that_cannot_be_looked_into_is_named(locked):
    run = load_runs(locked.parents[1])["demo"][0]
    assert (run.status, run.usable, run.config) == (Status.unfinished, False, None)
    assert any("config.yaml cannot be read" in problem.text for problem in run.problems)


def test_an_experiment_that_cannot_be_listed_is_one_sentence(good, monkeypatch):
    listed = Path.iterdir

    def refuse(path):
        if path == good.parent:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="can be read") as caught:
        load_runs(good.parents[1])
    assert f"{good.parent} (Permission denied)" in str(caught.value)


# -- what others put into run folders -----------------------------------------------------


def test_hidden_files_are_nobodys(good):
    """macOS's ._FILE, rsync's .FILE.XXXXXX, and hidden folders."""
    path = event_file(good)
    before = load_run(good)
    (good / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60))
    (good / f".{path.name}.q8XkzA").write_bytes(path.read_bytes()[:50])
    (good / ".snapshot").mkdir()
    (good / ".snapshot" / path.name).write_bytes(path.read_bytes())
    after = load_run(good)
    assert after.problems == before.problems == ()
    assert after.events.series == before.events.series


def test_an_empty_event_file_beside_the_others_is_named_and_spoils_nothing(good):
    before = load_run(good).events.series
    (good / "events.out.tfevents.9999999999.x.1.0").write_bytes(b"")
    run = _only_problem(good, "events.out.tfevents.9999999999.x.1.0 is empty; the other event files", spoils=False)
    assert run.events.series == before


def test_an_empty_event_file_alone_spoils_the_run(good):
    path = event_file(good)
    path.write_bytes(b"")
    _only_problem(good, f"damaged event file {path.name}, byte 0: the file is empty; restore")


def test_no_cure_destroys_results(good):
    for name in ("config.yaml", "result.json"):
        content = (good / name).read_bytes()
        (good / name).write_bytes(b"[")
        assert not any("delete" in problem.text for problem in load_run(good).problems)
        (good / name).write_bytes(content)
    path = event_file(good)
    path.write_bytes(path.read_bytes()[:-3])
    assert load_run(good).problems
    assert not any("delete" in problem.text for problem in load_run(good).problems)
