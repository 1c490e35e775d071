"""From run folders of low-rank training to its table and plots."""

import csv
import io
import json

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from analysis import oialr as report
from analysis.load import load_runs
from runfolder.folder import RunFolder
from slurm.command import main
from tests.run_folders import configuration, write_run
from tests.same_runs import points

TOY = ["data=digits", "data.augment=none", "data.image_size=8", "data.mean=[0.0]", "data.std=[1.0]", "model.patch=2"]
TOY += ["model.width=12", "model.depth=2", "model.heads=2", "batch_size=300", "epochs=3", "schedule.warmup_epochs=0"]
TOY += ["precision=fp32", "optim.lr=0.01", "runtime.gpus=0", "runtime.progress=false", "runtime.threads=1"]
LOW = ["method=oialr", "method.delay=7", "method.stability_frequency=2", "method.network_layer_perc_step=0.5"]
LOW += ["method.sigma_cutoff_fraction=0.4"]
CONVERSION, NEVER = "oialr freeze=conversion", "oialr freeze=never"
SHAPES = {"qkv": (36, 12), "proj": (12, 12), "fc1": (48, 12), "fc2": (48, 12), "patch": (12, 4)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of low rank, one that only looks, and two of plain training."""
    folder = tmp_path_factory.mktemp("runs")
    for choices in (
        LOW,
        [*LOW, "seed=1"],
        [*LOW, "method.freeze=never"],
        ["method=vanilla"],
        ["method=vanilla", "seed=1"],
    ):
        assert main("oialr", "", "", [*TOY, *choices, f"runtime.runs={folder}"]) == 0
    return folder


def _of(runs, label):
    """[(result, {tag: [(epoch, value)]})] of a method's runs by seed, as TensorBoard reads them."""
    found = {}
    for path in (runs / "oialr").iterdir():
        (run,) = [run for run in load_runs(runs, "oialr")["oialr"] if run.folder.path == path]
        method = run.config["method"]
        name = "vanilla" if method["name"] == "vanilla" else f"oialr freeze={method['freeze']}"
        if name == label:
            found[run.seed] = (json.loads(RunFolder(path).result.read_text()), points(RunFolder(path)))
    return [found[seed] for seed in sorted(found)]


def _last(curves, tag):
    return [own[tag][-1][1] for _, own in curves]


def _lines(capsys, runs, out, *flags):
    assert report.main(["--runs", str(runs), "--out", str(out), "--no-cache", "--format", "json", *flags]) == 0
    content = json.loads(capsys.readouterr().out)
    return {line["method"]: line for line in content["lines"]}, content["named"]


# -- the table --------------------------------------------------------------------------------------


def test_the_table_is_what_the_event_files_say(runs, tmp_path, capsys):
    lines, named = _lines(capsys, runs, tmp_path)
    assert list(lines) == ["vanilla", CONVERSION, NEVER]
    for label, line in lines.items():
        curves = _of(runs, label)
        top1 = _last(curves, "test/top1")
        assert (line["n"], line["mean"]) == (len(curves), pytest.approx(np.mean(top1)))
        assert line["std"] == (pytest.approx(np.std(top1, ddof=1)) if len(curves) == 2 else None)
        seconds = [result["train_seconds"] / result["steps"] for result, _ in curves]
        assert line["seconds_per_step"] == pytest.approx(np.mean(seconds), rel=0.02)
        if label == "vanilla":
            continue
        for name in ("trainable_percent", "total_percent", "inference_percent", "low_rank_layers"):
            assert line[name] == pytest.approx(np.mean(_last(curves, f"oialr/{name}")))
        for name in ("flops_step", "flops_inference"):
            assert line[name] == pytest.approx(np.mean(_last(curves, f"oialr/{name}")))
    plain, looked = lines["vanilla"], lines[NEVER]
    assert [plain[f"{name}_percent"] for name in ("trainable", "total", "inference")] == [100] * 3
    assert (plain["flops_step"], plain["flops_inference"]) == (looked["flops_step"], looked["flops_inference"])
    assert plain["low_rank_layers"] == looked["low_rank_layers"] == 0 < lines[CONVERSION]["low_rank_layers"]
    assert lines[CONVERSION]["flops_inference"] < plain["flops_inference"]
    assert any(f"missing: {NEVER} with seed 1" in sentence for sentence in named)


def test_percentages_follow_from_the_ranks(runs, tmp_path, capsys):
    lines, _ = _lines(capsys, runs, tmp_path)
    expected = {"trainable": [], "total": [], "inference": []}
    for _, curves in _of(runs, CONVERSION):
        dense = _last(_of(runs, "vanilla"), "model/parameters_trainable")[0]
        ranks = {tag.removeprefix("oialr/rank/"): own[-1][1] for tag, own in curves.items() if "oialr/rank/" in tag}
        assert len(ranks) == 9
        counts = dict.fromkeys(expected, dense)
        for layer, k in ranks.items():
            m, n = SHAPES["patch" if "patch" in layer else layer.rpartition(".")[2]]
            counts["trainable"] += k * k - m * n
            counts["total"] += k * (m + k + n) - m * n
            counts["inference"] += min(k * (m + n) - m * n, 0)
        for name, count in counts.items():
            expected[name].append(100 * count / dense)
    for name, values in expected.items():
        assert lines[CONVERSION][f"{name}_percent"] == pytest.approx(np.mean(values), rel=1e-5)
    assert lines[CONVERSION]["inference_percent"] < 100


@pytest.mark.parametrize("form", ["md", "latex", "csv"])
def test_every_format_has_every_line(form, runs, tmp_path, capsys):
    lines, _ = _lines(capsys, runs, tmp_path)
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--no-cache", "--format", form]) == 0
    said = capsys.readouterr()
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(said.out)))
        assert [(row["method"], row["n"], float(row["mean"])) for row in rows] == [
            (label, str(line["n"]), line["mean"]) for label, line in lines.items()
        ]
        assert "missing:" in said.err
        return
    split = " & " if form == "latex" else "|"
    rows = [[word.strip() for word in line.split(split)] for line in said.out.splitlines() if "minivit on" in line]
    rows = [row[form == "md" :] for row in rows]
    assert [row[1].replace("\\", "") for row in rows] == list(lines)
    low = lines[CONVERSION]
    low = f"{low['flops_inference'] / 1e6:.1f}"
    assert rows[1][7].replace(r"$\pm$", "±").split(" ")[0] == low


# -- the plots --------------------------------------------------------------------------------------


def _figures(runs):
    return report.draw(report.report_of(load_runs(runs, "oialr")["oialr"]))


def test_lines_are_the_means_of_the_event_files(runs):
    (figure,) = _figures(runs).values()
    rows = {CONVERSION: figure.axes[:3], NEVER: figure.axes[3:]}
    assert len(figure.axes) == 6
    for label, panels in rows.items():
        curves = [own for _, own in _of(runs, label)]
        layers = [tag.removeprefix("oialr/rank/") for tag in curves[0] if tag.startswith("oialr/rank/")]
        for axes, name in zip(panels, ("stability", "mixing_distance", "rank"), strict=True):
            expected = []
            for layer in layers:
                tag = f"oialr/{name}/{layer}"
                if not all(tag in own for own in curves):
                    continue
                means = np.mean([[value for _, value in own[tag]] for own in curves], axis=0)
                full = min(SHAPES["patch" if "patch" in layer else layer.rpartition(".")[2]])
                expected.append(([x for x, _ in curves[0][tag]], means * (100 / full if name == "rank" else 1)))
            assert len(axes.lines) == len(expected) > 0
            for line, (xs, ys) in zip(axes.lines, expected, strict=True):
                assert list(line.get_xdata()) == xs
                np.testing.assert_allclose(line.get_ydata(), ys)
    ranks = figure.axes[2]
    assert any(line.get_ydata()[-1] < 100 for line in ranks.lines)
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.texts} == {
        "patch_embed.proj",
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    }


def test_figures_are_files(runs, tmp_path, capsys):
    _lines(capsys, runs, tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"oialr.png", "oialr.pdf"}
    _lines(capsys, runs, tmp_path / "page.svg")
    assert [path.name for path in tmp_path.glob("*.svg")] == ["page.svg"]


# -- gaps -------------------------------------------------------------------------------------------

ALL = ["oialr/trainable_percent", "oialr/total_percent", "oialr/inference_percent", "oialr/low_rank_layers"]
ALL += ["oialr/flops_step", "oialr/flops_inference", "oialr/rank/a.0.fc", "oialr/stability/a.0.fc"]
ALL += ["oialr/mixing_distance/a.0.fc", "oialr/full_rank/a.0.fc"]


def _written(folder, without=(), seed=0, epochs=4, method="oialr", **changes):
    """A run folder whose scalar number i is 10 i + epoch, without some (tag, epoch); its path."""
    config = configuration(seed, method, epochs) | changes
    path = write_run(folder, config, [50.0 + epoch for epoch in range(epochs)], experiment="oialr")
    if method == "oialr":
        with SummaryWriter(str(path)) as writer:
            for index, tag in enumerate(ALL):
                for epoch in range(1, epochs + 1):
                    if (tag, epoch) not in without:
                        writer.add_scalar(tag, 10 * index + epoch, epoch)
    return path


def test_what_a_run_has_not_logged_is_named_and_enters_no_mean(tmp_path, capsys):
    whole = _written(tmp_path / "runs")
    gone = _written(tmp_path / "runs", seed=1, without=[("oialr/flops_step", 4), ("oialr/stability/a.0.fc", 4)])
    lines, named = _lines(capsys, tmp_path / "runs", tmp_path / "out")
    assert (lines["oialr"]["n"], lines["oialr"]["flops_step_n"], lines["oialr"]["flops_inference_n"]) == (2, 1, 2)
    assert lines["oialr"]["flops_step"] == 44
    (sentence,) = [sentence for sentence in named if "at the last epoch" in sentence]
    assert sentence.startswith(f"{gone}: without oialr/flops_step, oialr/stability/a.0.fc at the last epoch;")
    assert str(whole) not in sentence
    flags = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--no-cache", "--strict"]
    assert report.main(flags) == 1


def test_unfinished_runs_are_named_and_left_out(tmp_path, capsys):
    _written(tmp_path)
    config = configuration(1, "oialr", 4)
    path = write_run(tmp_path, config, [50.0], finished=False, experiment="oialr")
    lines, named = _lines(capsys, tmp_path, tmp_path / "out")
    assert lines["oialr"]["seeds"] == [0]
    assert any(str(path) in sentence and "unfinished" in sentence for sentence in named)


def test_an_epoch_that_is_missing_interrupts_the_line(tmp_path):
    _written(tmp_path, without=[("oialr/stability/a.0.fc", epoch) for epoch in (1, 3)])
    (figure,) = _figures(tmp_path).values()
    stability, _, rank = (axes.lines[0] for axes in figure.axes)
    assert list(stability.get_xdata()) == [2, 3, 4]
    np.testing.assert_array_equal(stability.get_ydata(), [72, np.nan, 74])
    np.testing.assert_allclose(rank.get_ydata(), 100 * np.array([61, 62, 63, 64]) / 94)  # of the full one


def test_plain_training_has_no_operations_where_nobody_counted_them(tmp_path, capsys):
    _written(tmp_path)
    _written(tmp_path, method="vanilla")
    lines, _ = _lines(capsys, tmp_path, tmp_path / "out")
    assert (lines["vanilla"]["trainable_percent"], lines["vanilla"]["flops_step"]) == (100, None)


def test_settings_have_lines_and_figures_of_their_own(tmp_path, capsys):
    for size in (64, 128):
        _written(tmp_path / "runs", batch_size=size)
    flags = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--no-cache", "--format", "json"]
    assert report.main(flags) == 0
    settings = [line["setting"] for line in json.loads(capsys.readouterr().out)["lines"]]
    assert settings == ["small on digits, batch_size=64", "small on digits, batch_size=128"]
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"oialr_1", "oialr_2"}
