"""What is wrong with a run folder is said, in one sentence with the folder and a cure."""

import json
import shutil

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from analysis.load import InputError, Status, load_run, load_runs
from tests.run_folders import configuration, curve, event_file, record_offsets, write_run


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
    run = _only_problem(folder, "duplicate", "test/top1", "at epoch 2;", spoils=False)
    assert run.curve("test/top1")[2] == 12.5


def test_missing_epochs_are_named(tmp_path):
    folder = write_run(tmp_path, configuration(epochs=3), [])
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


def test_a_result_of_another_length_is_named(good):
    _rewrite(good / "result.json", epochs=6)
    _only_problem(good, "result.json says 6 epochs, config.yaml 5")


def test_submission_folders_are_not_runs(tmp_path, good):
    (tmp_path / "demo" / "slurm" / "123").mkdir(parents=True)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "empty").mkdir()
    assert {name: [run.folder for run in runs] for name, runs in load_runs(tmp_path).items()} == {"demo": [good]}


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
    with pytest.raises(InputError, match=sentence) as caught:
        load_runs(tmp_path / root, experiment)
    assert "\n" not in str(caught.value)


def test_a_moved_copy_reads_the_same(tmp_path, good):
    copy = tmp_path / "demo" / "copy"
    shutil.copytree(good, copy)
    assert load_run(copy).curve("test/top1") == load_run(good).curve("test/top1")
