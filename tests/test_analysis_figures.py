"""The paper's figures from synthetic runs of its grids: every line and band against numpy, every gap named."""

import copy
import functools
import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import figures
from analysis.events import EventLog, Series
from analysis.load import Problem, Run, Status
from analysis.paper_figures import ALL, build_figure, draw_figure, figure_names
from analysis.paper_runs import cohorts
from analysis.paper_sets import set_of
from experiments.config import compose_config, parse_overrides, to_tree
from experiments.grid import load_grid, points
from runfolder.errors import UserError
from runfolder.folder import RunFolder
from tests.run_folders import ATTEMPT, folder_name, write_final

ROOT = Path(__file__).parents[1]
SEEDS = range(5)
LAMBDAS = {"vanilla": None, "TrAct, λ = 0.05": 0.05, "TrAct, λ = 0.1": 0.1, "TrAct, λ = 0.2": 0.2}
EPOCHS = (100, 200, 400, 800)
GRIDS = ["figure3", "figure10", "figure4", "figure6", "figure7", "figure8", "figure9", "table2"]
SEARCHES = ["figure3_lr", "table2_lr"]
UNIT, BYTES = [1.0] * 3, [0.00392156862745098] * 3


# -- synthetic runs ---------------------------------------------------------------------------------


@functools.cache
def _composed(experiment, text):
    return to_tree(compose_config(experiment, json.loads(text)))


def _configuration(experiment, point):
    """As training composes it; what is the same for many runs is composed once."""
    own = {key: value for key, value in point.items() if not key.startswith(("seed", "method", "optim.lr"))}
    config = copy.deepcopy(_composed(experiment, json.dumps(own, sort_keys=True)))
    method = _composed("cifar_vit", json.dumps({"method": point.get("method", "vanilla"), "epochs": 200}))["method"]
    config["method"] = method | {k.removeprefix("method."): v for k, v in point.items() if k.startswith("method.")}
    config["optim"]["lr"] = point.get("optim.lr", config["optim"]["lr"])
    return config | {"seed": point["seed"]}


def _random(point):
    return np.random.default_rng(list(json.dumps(point, sort_keys=True).encode()))


def _series(values):
    series = Series()
    for step, value in values.items():
        series.append(step, value, 0.0)
    return series


def _run(experiment, point):
    config = _configuration(experiment, point)
    folder = RunFolder(Path("runs", experiment, folder_name(config)))
    epochs = config["epochs"]
    evaluated = range(1, epochs + 1) if epochs <= 200 and experiment != "cifar_resnet" else [epochs]
    top1 = 70 + 5 * np.sqrt(np.array(evaluated) / epochs) + _random(config | {"runtime": 0}).normal(size=len(evaluated))
    accuracies = dict(zip(evaluated, top1.tolist(), strict=True))
    series = {"test/top1": _series(accuracies), "test/top5": _series({k: v / 2 + 50 for k, v in accuracies.items()})}
    return Run(folder, config, {}, None, Status.finished, EventLog((), series), (ATTEMPT,), ())


@functools.cache
def _all_runs():
    """{run folder: run}; a run of several grids once."""
    found = {}
    for name in GRIDS + SEARCHES:
        grid = load_grid(name)
        for point in points(grid, {}):
            run = _run(grid["experiment"], point)
            found.setdefault(run.folder, run)
    return found


def _by_experiment(runs):
    grouped = {}
    for run in runs:
        grouped.setdefault(run.experiment, []).append(run)
    return grouped


@pytest.fixture(scope="module")
def whole():
    return _by_experiment(_all_runs().values())


@pytest.fixture(scope="module")
def part():
    """Seven of ten runs, and of one line in figure 3 nothing at 200 epochs."""
    random = np.random.default_rng(1)
    kept = [run for run in _all_runs().values() if random.random() < 0.7 and not _gone(run.config)]
    return _by_experiment(kept)


def _gone(config):
    return config["epochs"] == 200 and config["optim"]["name"] == "sgd" and config["method"].get("lambda_") == 0.1


# -- what must be in a figure, said a second time -----------------------------------------------------

RESNET = {"experiment": "cifar_resnet", "data": "cifar10"}
VIT = {"experiment": "cifar_vit", "data": "cifar10", "std": [0.2023, 0.1994, 0.2010]}
SWEEP = [0.00625 * 2**k for k in range(9)]


def _methods(**facts):
    return {label: [facts | {"lambda": lambda_, "epochs": e} for e in EPOCHS] for label, lambda_ in LAMBDAS.items()}


def _sweep(lambdas, **facts):
    return {
        "vanilla": [facts | {"lambda": None, "epochs": 200}],
        "TrAct": [facts | {"lambda": value, "epochs": 200} for value in lambdas],
    }


def _mixed(value):
    adam, mixed = RESNET | {"optim": "adam"}, RESNET | {"optim": "sgd_adam"}
    return {
        "vanilla, Adam": [adam | {"lambda": None, "epochs": e} for e in EPOCHS],
        "TrAct, Adam": [adam | {"lambda": value, "epochs": e} for e in EPOCHS],
        "TrAct, its layer under SGD": [mixed | {"lambda": value, "epochs": e} for e in EPOCHS],
    }


FINALS = {  # figure -> (what is on the x-axis, a {label: facts of each point} per panel)
    "3": ("epochs", [_methods(**RESNET, optim="sgd"), _methods(**RESNET, optim="adam")]),
    "10": ("epochs", [_methods(**RESNET | {"data": "cifar100"}, optim=name) for name in ("sgd", "adam")]),
    "4": ("epochs", [_methods(**VIT)]),
    "6": ("lambda", [_sweep(SWEEP, **VIT)]),
    "8": ("lambda", [_sweep(SWEEP[:-1], **VIT | {"std": std}) for std in (UNIT, BYTES)]),
    "9": ("epochs", [_mixed(value) for value in (0.05, 0.1, 0.2)]),
}
ADAM = [0.01, 0.01, 0.001, 0.001]
RATES = {"sgd": [0.08] * 4, "adam": ADAM, "sgd_adam": ADAM}  # of the ResNet on CIFAR, by epochs


def _facts(config):
    name = config["method"]["name"]
    return {
        "experiment": config["experiment"], "data": config["data"]["name"], "std": config["data"]["std"],
        "optim": config["optim"]["name"], "epochs": config["epochs"], "model": config["model"]["name"],
        "method": name, "lambda": config["method"].get("lambda_") if name in ("vanilla", "tract") else name,
    }  # fmt: skip


def _is_search(config):
    """A learning rate that was only tried."""
    if config["experiment"] == "cifar_vit":
        return False
    if config["experiment"] == "imagenet_resnet":
        return config["optim"]["lr"] != (0.141 if config["epochs"] == 30 else 0.1)
    return config["optim"]["lr"] != RATES[config["optim"]["name"]][EPOCHS.index(config["epochs"])]


def _having(runs, wanted):
    """The runs of these facts, by linear search."""
    found = []
    for run in runs.get(wanted["experiment"], []):
        facts = _facts(run.config)
        if not _is_search(run.config) and all(facts[key] == value for key, value in wanted.items()):
            found.append(run)
    return found


def _truth(runs, facts):
    """(mean, sample std, n) by numpy; nan where undefined."""
    values = [run.events.series["test/top1"].values[-1] for run in _having(runs, facts)]
    mean = np.mean(values) if values else np.nan
    return mean, np.std(values, ddof=1) if len(values) > 1 else np.nan, len(values)


def _named_lines(axes):
    return {re.sub(r" \(n = .*", "", line.get_label()): line for line in axes.lines if line.get_label()[0] != "_"}


def _edges(collection):
    """{x: (lowest, highest)} of a band."""
    paths = collection.get_paths()
    corners = np.vstack([path.vertices for path in paths]) if paths else np.empty((0, 2))
    return {x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in corners[:, 0]}


# -- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", ["whole", "part"])
@pytest.mark.parametrize("name", FINALS)
def test_every_final_value_and_band_is_numpys(name, coverage, request):
    runs = request.getfixturevalue(coverage)
    axis, panels = FINALS[name]
    figure, _ = draw_figure(name, runs)
    assert len(figure.axes) == len(panels)
    for axes, panel in zip(figure.axes, panels, strict=True):
        lines = _named_lines(axes)
        assert set(lines) == set(panel)
        bands = iter(axes.collections)
        for label, facts in panel.items():
            truth = np.array([_truth(runs, own) for own in facts])
            if axis == "lambda" and label == "vanilla":
                _assert_level(axes, lines[label], truth[0])
                continue
            xy = np.array([[own[axis] for own in facts], truth[:, 0]]).T
            np.testing.assert_allclose(lines[label].get_xydata(), xy, rtol=1e-12)
            _assert_band(_edges(next(bands)), xy[:, 0], truth)


def _assert_level(axes, line, truth):
    mean, std, _ = truth
    assert line.get_ydata() == pytest.approx([mean, mean], rel=1e-12)
    (box,) = axes.patches
    assert (box.get_y(), box.get_height()) == pytest.approx((mean - std, 2 * std), rel=1e-9)


def _assert_band(edges, xs, truth):
    """Where there is a standard deviation; matplotlib gives a point alone a band without width."""
    shown = np.isfinite(truth[:, 1])
    assert sorted(edges) == xs[shown].tolist()
    for x, (mean, std, _) in zip(xs[shown], truth[shown], strict=True):
        assert edges[x] == pytest.approx((mean - std, mean + std), rel=1e-12)


@pytest.mark.parametrize("name", FINALS)
def test_fewer_runs_than_the_papers_are_marked_and_counted(name, part):
    axis, panels = FINALS[name]
    figure, _ = draw_figure(name, part)
    counts = {}
    for axes, panel in zip(figure.axes, panels, strict=True):
        few = set()
        for label, facts in panel.items():
            truth = [(own[axis], *_truth(part, own)) for own in facts]
            counts.setdefault(label, []).extend(n for *_, n in truth)
            few |= {(x, mean) for x, mean, _, n in truth if 0 < n < 5 and x is not None and len(facts) > 1}
        open_ = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert {tuple(xy) for line in open_ for xy in line.get_xydata()} == few
    assert "Open markers: fewer than 5 runs." in _caption(figure)
    ranges = {
        label: f"{min(own)}–{max(own)}" if min(own) < max(own) else str(min(own)) for label, own in counts.items()
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{label} (n = {words})" for label, words in ranges.items()
    ]


def test_a_point_alone_shows_its_spread(whole):
    """Of 100, 200, 400 and 800 epochs only 800 has runs: a band has no width there."""
    runs = {"cifar_vit": [run for run in whole["cifar_vit"] if run.config["epochs"] == 800]}
    figure, _ = draw_figure("4", runs)
    mean, std, _ = _truth(runs, VIT | {"lambda": 0.1, "epochs": 800})
    sticks = [line.get_xydata() for line in figure.axes[0].lines if line.get_xdata().tolist() == [800, 800]]
    assert len(sticks) == 4
    assert any(stick[:, 1] == pytest.approx([mean - std, mean + std]) for stick in sticks)


CURVES = {
    "7": [("test/top1", {"vanilla": [VIT | {"lambda": None, "epochs": 200}],
                         "PatchNorm": [VIT | {"method": "patchnorm", "epochs": 200}],
                         "DualPatchNorm": [VIT | {"method": "dual_patchnorm", "epochs": 200}],
                         "TrAct, λ = 0.1": [VIT | {"lambda": 0.1, "epochs": 200}]})],
} | {
    figure: [(tag, {label: [{"experiment": "imagenet_resnet", "model": f"imagenet_resnet{depth}", "lambda": lambda_,
                             "epochs": epochs} for epochs in (30, 60, 90)] for label, lambda_ in LAMBDAS.items()})
             for tag in ("test/top1", "test/top5")]
    for figure, depth in {"5": 50, "11": 18, "12": 34}.items()
}  # fmt: skip


@pytest.mark.parametrize("coverage", ["whole", "part"])
@pytest.mark.parametrize("name", CURVES)
def test_every_curve_and_band_is_numpys(name, coverage, request):
    runs = request.getfixturevalue(coverage)
    figure, _ = draw_figure(name, runs)
    for axes, (tag, panel) in zip(figure.axes, CURVES[name], strict=True):
        lines = iter([line for line in axes.lines if line.get_label()[0] != "_"])
        bands = iter(axes.collections)
        for label, facts in ((label, own) for label, owns in panel.items() for own in owns):
            own = _having(runs, facts)
            if not own:
                continue
            values = np.array([list(run.events.series[tag].values) for run in own])
            line, edges = next(lines), _edges(next(bands))
            assert line.get_label().startswith(label)
            assert line.get_xdata().tolist() == list(range(1, facts["epochs"] + 1))
            np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0), rtol=1e-12)
            spread = values.std(axis=0, ddof=1) if len(own) > 1 else 0
            low = [edges[epoch][0] for epoch in line.get_xdata()]
            np.testing.assert_allclose(low, values.mean(axis=0) - spread, rtol=1e-12)
        assert next(lines, None) is None


@pytest.mark.parametrize("shift", [-40, 15])
def test_published_points_are_seen_however_far_ours_are_from_them(whole, shift):
    def moved(run):
        curve = {epoch: value + shift for epoch, value in run.curve("test/top1").items()}
        return replace(run, events=EventLog((), run.events.series | {"test/top1": _series(curve)}))

    figure, _ = draw_figure("5", {"imagenet_resnet": [moved(run) for run in whole["imagenet_resnet"]]})
    stars = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_marker() == "*"]
    low, high = figure.axes[0].get_ylim()
    assert len(stars) == 6
    assert all(low < value < high for value in stars)


def test_published_finals_stand_at_the_ends_of_figure_5_alone(whole):
    """Table 2 of the paper."""
    published = yaml.safe_load((ROOT / "analysis" / "published.yaml").read_text())["imagenet_resnet50"]
    for name, expected in {"5": published, "11": {}, "12": {}}.items():
        figure, _ = draw_figure(name, whole)
        for axes, quantity in zip(figure.axes, ("top1", "top5"), strict=True):
            stars = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "*"}
            assert stars == {(int(e), own[quantity][0]) for e, arms in expected.items() for own in arms.values()}
        assert ("published" in [text.get_text() for text in figure.legends[0].get_texts()]) == bool(expected)


# -- which runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figure_names())
def test_a_whole_figure_names_nothing_whatever_other_runs_there_are(name, whole):
    figure, named = draw_figure(name, whole)
    assert named == ()
    assert "missing" not in _caption(figure)


def _default_grid(experiment):
    text = (ROOT / "experiments" / f"{experiment}.py").read_text()
    return re.search(r'main\(".*", __doc__, grid="(\w+)"\)', text)[1]


def _commanded(named):
    """The grid points that the commands in the sentences make."""
    found = []
    for command in (match for sentence in named for match in re.findall(r"start: `(.*)`\.$", sentence)):
        python, script, submit, *words = shlex.split(command)
        experiment = Path(script).stem
        choices = parse_overrides(words)
        (grid,) = choices.pop("grid", [_default_grid(experiment)])
        assert (python, submit) == ("python", "--submit")
        assert load_grid(grid)["experiment"] == experiment
        found += points(load_grid(grid), choices)
    return found


def _texts(points):
    return sorted(json.dumps(point, sort_keys=True, default=list) for point in points)


def _grid_points(name):
    """All of a figure's grid; of table 2's the network's."""
    model = {"5": "imagenet_resnet50", "11": "imagenet_resnet18", "12": "imagenet_resnet34"}.get(name)
    grid = points(load_grid("table2" if model else f"figure{name}"), {})
    return [point for point in grid if model is None or point["model"] == model]


@pytest.mark.parametrize("name", figure_names())
def test_without_runs_nothing_is_drawn_and_the_commands_make_the_whole_grid(name):
    figure, named = draw_figure(name, {})
    assert figure is None
    assert f"none of its {len(_grid_points(name))} runs" in named[0]
    assert _texts(_commanded(named)) == _texts(_grid_points(name))


@pytest.mark.parametrize("name", figure_names())
def test_the_commands_make_exactly_the_missing_runs(name, part):
    _, named = draw_figure(name, part)
    here = {run.folder.name for runs in part.values() for run in runs}
    experiment = set_of(f"figure{name}")["experiment"]
    absent = [p for p in _grid_points(name) if folder_name(_configuration(experiment, p)) not in here]
    assert _texts(_commanded(named)) == _texts(absent)
    figure, _ = draw_figure(name, part)
    gap = f"{len(absent)} of {len(_grid_points(name))} runs missing or not usable: see"
    assert f"{gap} `python analysis/figures.py --figure {name}`." in _caption(figure)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_sets_of_the_rate_searches_are_their_grids(name):
    spec = set_of(name)
    grid = [_facts_of_search(point) for point in points(load_grid(name), {})]
    own = [_facts_of_search(cohort.choices) for cohort in cohorts(spec)]
    assert sorted(own) == sorted(grid)


def _facts_of_search(point):
    return point["epochs"], point.get("optim", "sgd"), point["optim.lr"]


def _changed(runs, change):
    """The same runs, the first one of figure 4 at 100 epochs changed."""
    first = next(run for run in runs["cifar_vit"] if run.config["epochs"] == 100)
    return runs | {"cifar_vit": [change(run) if run is first else run for run in runs["cifar_vit"]]}, first


def _replaced(run, **changes):
    return Run(**{key: changes.get(key, getattr(run, key)) for key in Run.__dataclass_fields__})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: _replaced(run, config=run.config | {"batch_size": 256}), "batch_size=256 instead of 128"),
        (lambda run: _replaced(run, config=run.config | {"label_smoothing": 0.0}), "label_smoothing=0 instead of 0.1"),
        (lambda run: _replaced(run, problems=(Problem("it is damaged.", True),)), "it is damaged."),
        (lambda run: _replaced(run, status=Status.failed, problems=(Problem("it failed.", True),)), "it failed."),
    ],
)
def test_a_run_that_is_not_the_papers_is_named_and_not_drawn(whole, change, words):
    runs, odd = _changed(whole, change)
    figure, named = draw_figure("4", runs)
    assert any(words in sentence for sentence in named)
    left = {"cifar_vit": [run for run in whole["cifar_vit"] if run is not odd]}
    mean, _, n = _truth(left, VIT | {"lambda": None, "epochs": 100})
    assert n == 4
    assert _named_lines(figure.axes[0])["vanilla"].get_ydata()[0] == pytest.approx(mean, rel=1e-12)
    assert "1 of 80 runs missing or not usable" in _caption(figure)


def test_runs_that_differ_in_what_the_paper_leaves_open_are_not_mixed(whole):
    runs, _ = _changed(whole, lambda run: _replaced(run, config=run.config | {"clip_grad_norm": 1.0}))
    built = build_figure("4", runs)
    assert any("differ in clip_grad_norm" in sentence for sentence in built.named)
    assert [point.cell.summary.n for point in built.panels[0].lines[0].points] == [0, 5, 5, 5]


# -- looks --------------------------------------------------------------------------------------------


def _caption(figure):
    return " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("coverage", ["whole", "part"])
@pytest.mark.parametrize("name", figure_names())
def test_nothing_overlaps_or_leaves_the_figure(name, coverage, request):
    figure, _ = draw_figure(name, request.getfixturevalue(coverage))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [figure.legends[0].get_window_extent(renderer), figure._supxlabel.get_window_extent(renderer)]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for axes in figure.axes:
        for texts in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
            own = [text.get_window_extent(renderer) for text in texts if text.get_text()]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(own, 2))


@pytest.mark.parametrize("name", figure_names())
def test_lines_differ_also_without_colours(name, whole):
    figure, _ = draw_figure(name, whole)
    for axes in figure.axes:
        looks = [(line.get_linestyle(), line.get_marker()) for line in _named_lines(axes).values()]
        for one, other in itertools.combinations(looks, 2):
            assert one[0] != other[0]
            assert one[1] != other[1]


def test_only_the_ticks_of_the_settings_are_shown(whole):
    ticks = draw_figure("3", whole)[0].axes[0].get_xticks()
    assert list(ticks) == list(EPOCHS)
    axes = draw_figure("6", whole)[0].axes[0]
    assert list(axes.get_xticks()) == SWEEP
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "0.00625", "", "0.025", "", "0.1", "", "0.4", "", "1.6",
    ]  # fmt: skip


# -- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Three runs of figure 6 (and 4) in folders."""
    for seed in range(3):
        config = _configuration("cifar_vit", {"epochs": 200, "method": "vanilla", "seed": seed})
        write_final(tmp_path / "runs", config | {"eval_every": 200}, {"test/top1": 90.0 + seed})
    return tmp_path / "runs"


def test_the_command_line_writes_figures_and_names_gaps(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert figures.main(["--figure", "6", "--runs", str(folders), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(out / "figure6.png"), str(out / "figure6.pdf")]
    assert all(Path(path).stat().st_size > 0 for path in said.out.split())
    assert len(_commanded(said.err.splitlines())) == 47
    assert figures.main(["--figure", "6", "--runs", str(folders), "--out", str(tmp_path / "a.pdf"), "--strict"]) == 1
    assert (tmp_path / "a.png").exists()


def test_a_page_gets_one_svg_of_the_same_bytes_each_time(folders, tmp_path, capsys):
    for name in ("a", "b"):
        assert figures.main(["--figure", "6", "--runs", str(folders), "--out", str(tmp_path / name / "6.svg")]) == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["6.svg"]
    assert (tmp_path / "a" / "6.svg").read_bytes() == (tmp_path / "b" / "6.svg").read_bytes()


def test_all_figures_are_those_that_have_runs(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert figures.main(["--figure", ALL, "--runs", str(folders), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in out.glob("*.png")) == ["figure4.png", "figure6.png", "figure7.png"]
    for name in ("3", "5", "8", "9", "10", "11", "12"):
        assert f"figure {name}: not drawn" in said.err


def test_an_empty_folder_gives_no_figure(tmp_path, capsys):
    arguments = ["--figure", "12", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    assert figures.main(arguments) == 0
    assert "figure 12: not drawn, because none of its 12 runs is here and usable." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert figures.main([*arguments, "--strict"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--figure", "13"], "expected a figure of the paper (3, 4, 5, 6, 7, 8, 9, 10, 11, 12 or all), got 13."),
        (["--figure", "6", "--out", "file"], "expected --out to be a place to write to, got file (File exists)."),
        (["--figure", "all", "--out", "a.png"], "expected --out to be a folder for 10 figures, got a.png"),
        (["--figure", "6", "--experiment", "cifar_vit"], "expected --experiment or --figure, got both"),
        (["--figure", "6", "--runs", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(folders, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(folders.parent)
    (folders.parent / "file").touch()
    assert figures.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_no_such_figure_is_an_error_for_callers_too():
    with pytest.raises(UserError, match="got 1"):
        draw_figure("1", {})
