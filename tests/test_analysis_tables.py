"""Tables of synthetic run folders whose truth is known, cell by cell against numpy and scipy."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from torch.utils.tensorboard import SummaryWriter

from analysis import figures, tables
from analysis.drawing import curve_of
from analysis.grouping import method_labels, settings, short_names, varying_keys
from analysis.rendering import latex_escape
from tests.run_folders import ATTEMPT, configuration, curve, event_file, record_offsets, write_final, write_run

ROOT = Path(__file__).parents[1]
SEEDS = range(4)
METHODS = {
    "vanilla": {"name": "vanilla"},
    "tract lambda_=0.05": {"name": "tract", "lambda_": 0.05, "layer": None},
    "tract lambda_=0.1": {"name": "tract", "lambda_": 0.1, "layer": None},
}
CONFIGS = [("big", 5), ("big", 10), ("small", 5)]


def _level(model, epochs, label):
    return 60.0 + 5 * (model == "big") + epochs + 0.8 * list(METHODS).index(label)


def _write_all(runs):
    for model, epochs in CONFIGS:
        for label, method in METHODS.items():
            for seed in SEEDS:
                config = configuration(seed, method, epochs, model)
                write_run(runs, config, curve(seed, label, epochs, _level(model, epochs, label)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    _write_all(runs)
    return runs


@pytest.fixture
def runs(tmp_path):
    """Two methods, three seeds, one configuration: small enough to damage."""
    for method in ("vanilla", "tract"):
        for seed in range(3):
            write_run(tmp_path / "runs", configuration(seed, method), curve(seed, method))
    return tmp_path / "runs"


def _one(runs, method, seed):
    (folder,) = (runs / "demo").glob(f"small-{method}-s{seed}-*")
    return folder


def _truth(model, epochs, label, choose):
    curves = [curve(seed, label, epochs, _level(model, epochs, label)) for seed in SEEDS]
    return np.array([choose(own) for own in curves], dtype=np.float32).astype(float)


def _json(capsys, *arguments):
    code = tables.main(["--format", "json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def _cells(row):
    return {cell["method"]: cell for cell in row["cells"]}


@pytest.mark.parametrize(("flags", "choose"), [((), lambda c: c[-1]), (("--best",), max)])
def test_every_cell_is_numpys(whole, capsys, flags, choose):
    code, (table,) = _json(capsys, "--runs", whole, *flags)
    assert code == 0
    assert table["axes"] == ["model", "epochs"]
    assert table["methods"] == list(METHODS)
    assert [(row["settings"]["model"], row["settings"]["epochs"]) for row in table["rows"]] == [
        ("big", 5),
        ("big", 10),
        ("small", 5),
    ]
    for row in table["rows"]:
        for label, cell in _cells(row).items():
            truth = _truth(row["settings"]["model"], row["settings"]["epochs"], label, choose)
            assert cell["values"] == truth.tolist()
            assert cell["seeds"] == list(SEEDS)
            assert (cell["n"], cell["mean"], cell["std"]) == (4, truth.mean(), truth.std(ddof=1))
            assert len(cell["runs"]) == 4
            assert all(Path(run, "config.yaml").exists() for run in cell["runs"])


def test_every_difference_is_scipys_and_holm_is_over_the_whole_table(whole, capsys):
    _, (table,) = _json(capsys, "--runs", whole)
    found, p_t, p_permutation = [], [], []
    for row in table["rows"]:
        where = row["settings"]["model"], row["settings"]["epochs"]
        assert _cells(row)["vanilla"]["difference"] is None
        for label in list(METHODS)[1:]:
            a, b = (_truth(*where, name, lambda c: c[-1]) for name in (label, "vanilla"))
            own, oracle = _cells(row)[label]["difference"], stats.ttest_rel(a, b)
            exact = stats.permutation_test((a - b,), np.sum, permutation_type="samples", n_resamples=np.inf)
            assert (own["n"], own["mean"]) == (4, pytest.approx((a - b).mean()))
            assert (own["low"], own["high"]) == pytest.approx(oracle.confidence_interval(0.95), rel=1e-9)
            assert own["p_permutation"] == pytest.approx(exact.pvalue)
            found.append(own)
            p_t.append(oracle.pvalue)
            p_permutation.append(exact.pvalue)
    assert len(found) == 6
    assert [d["p_t"] for d in found] == pytest.approx(p_t, rel=1e-9)
    assert [d["p_holm"] for d in found] == pytest.approx(multipletests(p_t, method="holm")[1], rel=1e-9)
    holm = multipletests(p_permutation, method="holm")[1]
    assert [d["p_holm_permutation"] for d in found] == pytest.approx(holm)


def test_what_can_be_detected_is_what_statsmodels_needs_so_many_pairs_for(whole, capsys):
    _, (table,) = _json(capsys, "--runs", whole)
    row = table["rows"][0]
    for label in list(METHODS)[1:]:
        a, b = (_truth("big", 5, name, lambda c: c[-1]) for name in (label, "vanilla"))
        effect = _cells(row)[label]["difference"]["detectable"] / (a - b).std(ddof=1)
        assert TTestPower().power(effect, nobs=4, alpha=0.05) == pytest.approx(0.8, abs=1e-6)


def test_speedups_are_those_of_straight_lines(tmp_path, capsys):
    """The baseline ends at 60 after 10 epochs of 2 s; TrAct is there after 4 of 3 s, but for one run that never is."""
    slopes = {"vanilla": [4.0, 4.0, 4.0], "tract": [10.0, 10.0, 0.1]}
    for method, seconds in (("vanilla", 2.0), ("tract", 3.0)):
        for seed, slope in enumerate(slopes[method]):
            folder = write_run(tmp_path, configuration(seed, method, 10), [20 + slope * e for e in range(1, 11)])
            with SummaryWriter(str(folder)) as writer:
                for epoch in range(1, 11):
                    writer.add_scalar("time/epoch_seconds", seconds, epoch)
    _, (table,) = _json(capsys, "--runs", tmp_path, "--speedup")
    own, base = (_cells(table["rows"][0])[method]["speedup"] for method in ("tract", "vanilla"))
    assert (own["epochs"]["value"], own["seconds"]["value"]) == pytest.approx((10 / 4, 20 / 12))
    assert (own["epochs"]["n"], own["epochs"]["censored"]) == (3, 1)
    assert own["epochs"]["times"] == {"0": pytest.approx(4), "1": pytest.approx(4), "2": None}
    assert base["epochs"]["value"] == pytest.approx(1)
    assert tables.main(["--runs", str(tmp_path), "--speedup"]) == 0
    text = capsys.readouterr().out
    assert "| 2.50 [0, 2.50] (3; 1 never)" in text
    assert "| 1.67 [0, 1.67] (3; 1 never) |" in text
    assert tables.main(["--runs", str(tmp_path), "--speedup", "--format", "csv"]) == 0
    (line,) = [row for row in csv.DictReader(io.StringIO(capsys.readouterr().out)) if row["method"] == "tract"]
    assert float(line["speedup_seconds_value"]) == own["seconds"]["value"]


def test_without_complete_times_there_is_no_speedup_in_seconds(runs, capsys):
    _, (table,) = _json(capsys, "--runs", runs, "--speedup")
    found = _cells(table["rows"][0])["tract"]["speedup"]
    assert found["seconds"] is None
    assert found["epochs"]["n"] == 3


def test_a_single_run_is_a_doubt(tmp_path, capsys):
    for model, seeds in (("big", 2), ("small", 1)):
        for seed in range(seeds):
            write_run(tmp_path, configuration(seed, model=model), curve(seed, model))
    code, (table,) = _json(capsys, "--runs", tmp_path, "--strict")
    assert (code, table["named"]) == (
        1, ["one run alone, so no spread, interval or test: vanilla (model=small); start more seeds."],
    )  # fmt: skip


def test_without_a_metric_each_experiment_shows_what_its_runs_are_known_by(tmp_path, capsys):
    for name, metric in (("one", "test/top1"), ("other", "test/loss")):
        write_run(tmp_path, configuration(), [50.0] * 5, experiment=name, result={"primary_metric": metric})
    _, found = _json(capsys, "--runs", tmp_path)
    assert [table["metric"] for table in found] == ["test/top1", "test/loss"]
    assert [table["rows"][0]["cells"][0]["mean"] for table in found] == [50.0, 0.5]


@pytest.mark.parametrize("value", [["x"], {}, 5, None])
def test_what_is_no_tag_is_no_primary_metric(tmp_path, capsys, value):
    for seed in range(3):
        result = {"primary_metric": value if seed else "test/loss"}
        write_run(tmp_path, configuration(seed), [50.0] * 5, result=result)
    assert _json(capsys, "--runs", tmp_path)[1][0]["metric"] == "test/loss"


@pytest.mark.parametrize("lr", [math.inf, -math.inf, math.nan])
def test_a_setting_that_is_not_finite_is_a_word(tmp_path, capsys, lr):
    write_run(tmp_path, configuration(lr=lr), curve(0, "vanilla"))
    write_run(tmp_path, configuration(method={"name": "tract", "lambda_": lr}), curve(0, "tract"))
    write_run(tmp_path, configuration(method={"name": "tract", "lambda_": 0.1}), curve(0, "tract"))
    _, (table,) = _json(capsys, "--runs", tmp_path)
    assert {row["settings"]["lr"] for row in table["rows"]} == {0.1, str(lr)}
    assert table["methods"] == ["vanilla", "tract lambda_=0.1", f"tract lambda_={lr}"]


def test_best_epoch_of_a_loss_is_the_smallest(whole, capsys):
    _, (table,) = _json(capsys, "--runs", whole, "--best", "--metric", "test/loss")
    row = table["rows"][0]
    curves = [curve(seed, "vanilla", 5, _level("big", 5, "vanilla")) for seed in SEEDS]
    expected = [float(np.float32(1 - max(own) / 100)) for own in curves]
    assert _cells(row)["vanilla"]["values"] == expected


def test_the_caption_says_which_epoch(whole, capsys):
    assert "of the final epoch" in _json(capsys, "--runs", whole)[1][0]["caption"]
    caption = _json(capsys, "--runs", whole, "--best")[1][0]["caption"]
    assert "BEST" in caption
    assert "SELECTED ON THE TEST SET" in caption


def test_all_formats_say_the_same(whole, capsys):
    _, (table,) = _json(capsys, "--runs", whole)
    texts = {}
    for form in ("md", "latex", "csv"):
        assert tables.main(["--runs", str(whole), "--format", form]) == 0
        texts[form] = capsys.readouterr().out
    lines = list(csv.DictReader(io.StringIO(texts["csv"])))
    cells = [(row["settings"], cell) for row in table["rows"] for cell in row["cells"]]
    assert len(lines) == len(cells) == 9
    for line, (values, cell) in zip(lines, cells, strict=True):
        assert (line["model"], line["epochs"]) == (values["model"], str(values["epochs"]))
        assert (line["method"], float(line["mean"]), float(line["std"])) == (cell["method"], cell["mean"], cell["std"])
        assert [float(value) for value in line["values"].split(";")] == cell["values"]
        assert line["runs"].split(";") == cell["runs"]
        p = line["difference_p_holm"]
        assert (float(p) if p else None) == (cell["difference"] and cell["difference"]["p_holm"])
    assert _grid(texts["md"], "|") == _grid(texts["latex"], "&")
    first = _grid(texts["md"], "|")[1]
    cell = _cells(table["rows"][0])["vanilla"]
    assert first[2] == f"{cell['mean']:.2f} ± {cell['std']:.2f} (4)"


def _grid(text, separator):
    """Header and rows of a Markdown or LaTeX table as plain words."""
    for pattern, sign in (
        (r"\$\\pm\$", "±"),
        (r"\$-\$", "−"),
        (r"\$\\Delta\$", "Δ"),
        (r"\\_", "_"),
        (r"\\textless{}", "<"),
    ):
        text = re.sub(pattern, sign, text)
    lines = [line for line in text.splitlines() if line.startswith("|") or line.endswith(r"\\")]
    words = [[word.strip() for word in line.removesuffix(r"\\").strip("|").split(separator)] for line in lines]
    return [row for row in words if not row[0].startswith(":")]


def test_latex_is_balanced_and_its_rows_are_as_long_as_its_columns(whole, capsys):
    tables.main(["--runs", str(whole), "--format", "latex"])
    text = capsys.readouterr().out
    opened, closed = re.findall(r"\\begin{(\w+)}", text), re.findall(r"\\end{(\w+)}", text)
    assert sorted(opened) == sorted(closed)
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    columns = len(re.search(r"\\begin{tabular}{(\w+)}", text)[1])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [columns] * 4
    assert not re.search(r"(?<!\\)[_#]", text.split("\n", 1)[1])
    assert not re.search(r"(?<!\\)%", text.split("\n", 1)[1])


def test_every_special_character_of_latex_is_escaped():
    escaped = latex_escape(r"a_b & 5% #1 $x {y} ~ ^ \z < > ±")
    assert escaped == (
        r"a\_b \& 5\% \#1 \$x \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z \textless{} "
        r"\textgreater{} $\pm$"
    )
    assert latex_escape("--resume [0.9]") == "-{}-resume [0.9]"
    assert latex_escape("[0.9]") == "{}[0.9]"  # would be an argument of the line break before it


def test_a_pipe_in_a_name_does_not_break_markdown(tmp_path, capsys):
    for lr in ("a|b", "c"):
        write_run(tmp_path, configuration(lr=lr), curve(0, "vanilla"))
    tables.main(["--runs", str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_a_new_line_in_a_name_does_not_break_markdown(tmp_path, capsys):
    for name in ("a\nb", "c\r\nd"):
        write_run(tmp_path, configuration(model="m", schedule={"name": name}), curve(0, "vanilla"))
    write_run(tmp_path, configuration(seed=1), [1.0], finished=False).rename(tmp_path / "demo" / "e\n- f")
    assert tables.main(["--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines if "|" in line}) == 1
    assert any(re.search(r"\| a b +\|", line) for line in lines)
    assert sum(line.startswith("- ") for line in lines) == 2


@pytest.mark.parametrize(("metric", "label"), [("test/top1", "test accuracy (%)"), ("test/map", "test/map")])
def test_an_axis_is_called_by_its_metric(tmp_path, metric, label):
    config = configuration(epochs=2, eval_every=2)
    folder = write_final(tmp_path, config, {metric: 0.5})
    content = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(content | {"primary_metric": metric}))
    figure = figures.draw(tables.tables_of(tmp_path)[0])
    plt.close(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [label]


def test_spoiled_runs_enter_no_mean_and_are_named(runs, capsys):
    unfinished, failed, damaged = _one(runs, "tract", 0), _one(runs, "tract", 1), _one(runs, "vanilla", 2)
    (unfinished / "result.json").unlink()
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text('{"kind": "non-finite", "reason": "loss is nan", "step": 3}')
    path = event_file(damaged)
    path.write_bytes(path.read_bytes()[:-1])
    code, (table,) = _json(capsys, "--runs", runs)
    cells = _cells(table["rows"][0])
    assert code == 0
    assert (cells["vanilla"]["seeds"], cells["tract"]["seeds"]) == ([0, 1], [2])
    assert cells["tract"]["std"] is None
    assert cells["tract"]["difference"]["n"] == 0
    for folder, word in ((unfinished, "unfinished"), (failed, "failed"), (damaged, "damaged event file")):
        assert any(str(folder) in line and word in line and f"--resume {folder}" in line for line in table["named"])
    assert tables.main(["--runs", str(runs), "--strict"]) == 1


def test_strict_is_content_with_a_whole_table(whole, capsys):
    assert tables.main(["--runs", str(whole), "--strict"]) == 0
    assert "Missing" not in capsys.readouterr().out


def test_pairs_are_matched_by_seed_and_missing_seeds_are_named(runs, capsys):
    shutil.rmtree(_one(runs, "vanilla", 0))
    shutil.rmtree(_one(runs, "tract", 2))
    code, (table,) = _json(capsys, "--runs", runs, "--strict")
    difference = _cells(table["rows"][0])["tract"]["difference"]
    a, b = (np.float32(curve(1, name)[-1]) for name in ("tract", "vanilla"))
    assert code == 1
    assert (difference["seeds"], difference["n"]) == ([1], 1)
    assert difference["mean"] == float(a) - float(b)
    assert (difference["low"], difference["p_t"], difference["p_holm"]) == (None, None, None)
    named = "\n".join(table["named"])
    assert f"missing: vanilla with seed 0, which {_one(runs, 'tract', 0)} has" in named
    assert "`python experiments/demo.py --local method=tract seed=2`" in named


def test_a_method_without_any_run_in_a_row_is_a_visible_gap(whole, capsys, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    for folder in (tmp_path / "runs" / "demo").glob("small-vanilla-*"):
        shutil.rmtree(folder)
    _, (table,) = _json(capsys, "--runs", tmp_path / "runs")
    (row,) = (row for row in table["rows"] if row["settings"]["model"] == "small")
    assert _cells(row)["vanilla"] | {"n": 0, "mean": None, "std": None, "runs": []} == _cells(row)["vanilla"]
    assert _cells(row)["tract lambda_=0.1"]["difference"]["mean"] is None
    assert any("missing: vanilla with seed 0, 1, 2, 3 (model=small, epochs=5)" in line for line in table["named"])


def test_the_same_run_twice_is_named_and_not_used(runs, capsys):
    folder = _one(runs, "tract", 1)
    shutil.copytree(folder, folder.with_name("copy"))
    _, (table,) = _json(capsys, "--runs", runs)
    assert _cells(table["rows"][0])["tract"]["seeds"] == [0, 2]
    assert any(str(folder) in line and "copy" in line and "several times" in line for line in table["named"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": "fedcba9876543210"}, ("commit", "0123456789ab (5 runs)", "fedcba987654")),
        ({"dirty": True}, ("commit", "uncommitted changes")),
        ({"packages": {"torch": "2.14.0"}}, ("torch version", "2.15.0 (5 runs)", "2.14.0")),
        ({"packages": {"torch": "2.15.0", "python": "3.12"}}, ("python version", "unknown (5 runs)", "3.12")),
        ({"hardware": {"device": "cuda"}}, ("hardware", "cpu (5 runs)", "cuda")),
    ],
)
def test_mixed_origins_are_named_with_the_odd_folder(runs, capsys, change, words):
    folder = _one(runs, "tract", 1)
    (folder / "provenance.json").write_text(json.dumps({"attempts": [ATTEMPT | change]}))
    code, (table,) = _json(capsys, "--runs", runs, "--strict")
    (sentence,) = table["named"]
    assert code == 1
    assert all(word in sentence for word in (*words, str(folder)))
    assert _cells(table["rows"][0])["tract"]["n"] == 3


def test_a_run_whose_attempts_differ_is_mixed(runs, capsys):
    attempts = [ATTEMPT, ATTEMPT | {"commit": "f" * 40}]
    (_one(runs, "tract", 1) / "provenance.json").write_text(json.dumps({"attempts": attempts}))
    assert "f" * 12 in _json(capsys, "--runs", runs)[1][0]["named"][0]


def test_a_value_that_is_not_finite_is_named(tmp_path, capsys):
    write_run(tmp_path, configuration(), [70.0, float("nan")], result={"metrics": {}}, experiment="demo")
    _, (table,) = _json(capsys, "--runs", tmp_path)
    assert table["rows"][0]["cells"][0]["n"] == 0
    write_run(tmp_path, configuration(seed=1, epochs=2), [70.0, float("nan")])
    _, (table,) = _json(capsys, "--runs", tmp_path)
    assert any("test/top1 is nan" in line for line in table["named"])


def test_the_best_epoch_is_unknown_where_epochs_are_missing(tmp_path, capsys):
    folder = write_run(tmp_path, configuration(), curve(0, "vanilla"))
    path = event_file(folder)
    content, offsets = path.read_bytes(), record_offsets(path)
    at = offsets[1 + 12 * 1 + 10]  # test/top1 of epoch 2
    path.write_bytes(content[:at] + content[offsets[offsets.index(at) + 1] :])
    assert _json(capsys, "--runs", tmp_path)[1][0]["rows"][0]["cells"][0]["n"] == 1
    _, (table,) = _json(capsys, "--runs", tmp_path, "--best")
    assert table["rows"][0]["cells"][0]["n"] == 0
    assert any("best epoch is unknown" in line for line in table["named"])


def test_settings_that_change_nothing_make_no_rows():
    a, b = configuration(0), configuration(1, {"name": "tract", "lambda_": 0.1})
    b["data"]["root"] = b["runtime"]["data_dir"] = "/elsewhere"
    assert settings(a) == settings(b)
    b["data"]["root"] = "/a/third"
    assert varying_keys([settings(a), settings(b)]) == ["data.root"]


def test_a_setting_within_one_model_makes_its_own_rows(tmp_path, capsys):
    for lr in (0.1, 0.05):
        for model in ("small", "big"):
            write_run(tmp_path, configuration(lr=lr, model=model), curve(0, lr))
    _, (table,) = _json(capsys, "--runs", tmp_path)
    assert table["axes"] == ["model", "lr"]
    assert [tuple(row["settings"].values()) for row in table["rows"]] == [
        ("big", 0.05),
        ("big", 0.1),
        ("small", 0.05),
        ("small", 0.1),
    ]


def test_names_are_short_but_unique():
    keys = ["model.name", "optim.lr", "schedule.lr", "optim.name", "epochs", "data.values"]
    assert list(short_names(keys).values()) == ["model", "optim.lr", "schedule.lr", "optim", "epochs", "data.values"]
    assert short_names(["lr", "optim.lr"]) == {"lr": "lr", "optim.lr": "optim.lr"}


@pytest.mark.parametrize("word", ["difference_mean", "speedup_epochs_n", "n"])
def test_a_setting_called_like_a_column_has_a_column_of_its_own(tmp_path, capsys, word):
    for seed in range(2):
        write_run(tmp_path, configuration(seed, **{word: seed}), [1.0] * 5)
    tables.main(["--runs", str(tmp_path), "--format", "csv", "--speedup"])
    head = capsys.readouterr().out.splitlines()[0].split(",")
    assert f"config.{word}" in head
    assert len(head) == len(set(head))


def test_labels_tell_variants_apart_and_nothing_else():
    nodes = [{"name": "t", "a": 1, "b": None}, {"name": "t", "a": 1, "b": 2.0}, {"name": "v", "a": 9}]
    assert method_labels(nodes) == ["t b=null", "t b=2", "v"]


def test_labels_of_several_methods_name_the_part_whose_option_differs():
    nodes = [{"name": "t+v", "t": {"name": "t", "a": a, "b": 1}, "v": {"name": "v"}} for a in (1, 2)]
    assert method_labels([*nodes, {"name": "v"}]) == ["t+v t.a=1", "t+v t.a=2", "v"]


def test_a_missing_seed_of_several_methods_is_started_as_a_list(runs, capsys):
    both = {"name": "tract+patchnorm", "tract": {"name": "tract"}, "patchnorm": {"name": "patchnorm"}}
    for seed in (0, 1):
        write_run(runs, configuration(seed, both), curve(seed, "both"))
    _, (table,) = _json(capsys, "--runs", runs)
    assert table["methods"] == ["vanilla", "tract", "tract+patchnorm"]
    assert "`python experiments/demo.py --local method='[tract,patchnorm]' seed=2`" in "\n".join(table["named"])


def test_another_baseline(whole, capsys):
    _, (table,) = _json(capsys, "--runs", whole, "--baseline", "tract lambda_=0.1")
    assert table["methods"][0] == table["baseline"] == "tract lambda_=0.1"
    assert [cell["difference"] is None for cell in table["rows"][0]["cells"]] == [True, False, False]


def test_without_a_baseline_there_are_no_differences(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path, configuration(seed, "tract"), curve(seed, "tract"))
    code, (table,) = _json(capsys, "--runs", tmp_path, "--strict")
    assert (code, table["baseline"]) == (0, None)
    assert "No differences" in table["caption"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runs", "absent"], "absent"),
        (["--experiment", "demmo"], "nearest: demo"),
        (["--metric", "test/top2"], "nearest: test/top1"),
        (["--baseline", "vanila"], "nearest: vanilla"),
        (["--out", "file"], "expected --out to be a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(runs, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(runs.parent)
    (runs.parent / "file").touch()
    assert tables.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_files_are_written_per_experiment(runs, tmp_path, capsys):
    write_run(runs, configuration(), curve(0, "vanilla"), experiment="other")
    for form, suffix in (("md", "md"), ("latex", "tex"), ("csv", "csv"), ("json", "json")):
        assert tables.main(["--runs", str(runs), "--format", form, "--out", str(tmp_path / "out")]) == 0
        for name in ("demo", "other"):
            assert (tmp_path / "out" / f"{name}-test-top1.{suffix}").read_text()
    (table,) = json.loads((tmp_path / "out" / "other-test-top1.json").read_text())
    assert table["experiment"] == "other"


def test_csv_says_what_is_missing_beside_the_table(runs, capsys):
    (_one(runs, "tract", 0) / "result.json").unlink()
    tables.main(["--runs", str(runs), "--format", "csv"])
    captured = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(captured.out)))) == 2
    assert "unfinished" in captured.err


@pytest.mark.parametrize("script", ["tables.py", "figures.py"])
def test_scripts_run_from_anywhere(runs, tmp_path, script):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "analysis" / script), "--runs", str(runs), "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(path) for path in map(Path, done.stdout.split()) if path.stat().st_size > 0]


def test_a_figure_has_a_panel_per_row_and_lines_of_the_loaded_means(whole):
    (table,) = tables.tables_of(whole)
    figure = figures.draw(table)
    assert len(figure.axes) == len(table.rows)
    for axes, row in zip(figure.axes, table.rows, strict=True):
        epochs = row.settings["epochs"]
        for line, label in zip(axes.lines, METHODS, strict=True):
            level = _level(row.settings["model"], epochs, label)
            truth = np.array([curve(seed, label, epochs, level) for seed in SEEDS], dtype=np.float32).astype(float)
            assert line.get_xdata().tolist() == list(range(1, epochs + 1))
            assert line.get_ydata() == pytest.approx(truth.mean(axis=0), rel=1e-12)
            own = curve_of(row.cells[label], "test/top1")
            assert own.stds == pytest.approx(truth.std(axis=0, ddof=1), rel=1e-9)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"{label} (n = 4)" for label in METHODS]


def test_a_mean_curve_has_only_the_epochs_that_all_runs_have(tmp_path):
    write_run(tmp_path, configuration(0), curve(0, "vanilla"))
    write_run(tmp_path, configuration(1), curve(1, "vanilla"))
    path = event_file(_one(tmp_path, "vanilla", 1))
    content, offsets = path.read_bytes(), record_offsets(path)
    path.write_bytes(content[: offsets[23]] + content[offsets[24] :])  # without test/top1 of epoch 2
    (table,) = tables.tables_of(tmp_path)
    own = curve_of(table.rows[0].cells["vanilla"], "test/top1")
    assert (own.n, own.epochs) == (2, (1, 3, 4, 5))


def test_a_long_title_stays_within_a_narrow_figure(tmp_path):
    write_run(tmp_path, configuration(), curve(0, "vanilla"), experiment="a_long_name_for_an_experiment")
    figure = figures.draw(tables.tables_of(tmp_path)[0])
    figure.canvas.draw()
    (box,) = (text.get_window_extent() for text in figure.texts if "a_long_name" in text.get_text())
    plt.close(figure)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_name_with_dollars_is_no_formula(tmp_path):
    write_run(tmp_path, configuration(method={"name": r"a$\frac$"}), curve(0, "vanilla"))
    figure = figures.draw(tables.tables_of(tmp_path)[0])
    figure.canvas.draw()
    plt.close(figure)
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == r"a$\frac$ (n = 1)"


def test_figures_of_nothing_say_so(tmp_path, capsys):
    assert figures.main(["--runs", str(tmp_path)]) == 2
    write_run(tmp_path / "runs", configuration(), [70.0], finished=False)
    assert figures.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "a.png")]) == 0
    assert "no figure" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("script", [tables, figures])
@pytest.mark.parametrize(("words", "answer"), [(["--runz", "x"], "--runs"), (["--experimant=x"], "--experiment")])
def test_an_unknown_flag_is_one_sentence_with_the_nearest(script, words, answer, capsys):
    assert script.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown flag")
    assert said.count("\n") == 1
    assert answer in said


def test_code_that_git_does_not_know_is_named_and_strict_about(runs, capsys):
    folder = _one(runs, "tract", 0)
    provenance = json.loads((folder / "provenance.json").read_text())
    for attempt in provenance["attempts"]:
        attempt |= {"commit": None, "dirty": None, "unknown": "fatal: not a git repository"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert tables.main(["--runs", str(runs), "--strict"]) == 1
    said = "".join(capsys.readouterr())
    assert f"the code of 1 run is unknown (fatal: not a git repository), so it may have been changed: {folder}" in said
