"""The paper's tables from synthetic runs of known truth, cell by cell; and the published numbers against themselves."""

import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis import paper, paper_runs, paper_sets, tables
from analysis.load import load_runs
from analysis.paper import build_paper_table
from analysis.paper_rendering import comparison_rows, published_rows, readable_cell, readable_rows
from analysis.paper_runs import cohorts, missing, missing_sentence
from analysis.paper_sections import paper_sections
from analysis.paper_sets import members_of_set, table_layout
from analysis.statistics import Summary, wilcoxon_p
from experiments.config import compose_config, parse_overrides, prepare_folder, to_tree
from experiments.grid import load_grid, plan, points
from tests.run_folders import ATTEMPT, write_final

ROOT = Path(__file__).parents[1]
PUBLISHED = yaml.safe_load((paper._HERE / "published.yaml").read_text())
SETS = table_layout()["sets"]
GRIDS = {"cifar100": "table1", "imagenet_resnet50": "table2", "deit3": "table3", "transfer": "table4"}
ZOO = {"SqueezeNet": "squeezenet", "VGG-11": "vgg11"}
ARMS = {
    "baseline": {"method": "vanilla", "epochs": 200},
    "tract": {"method": "tract", "epochs": 200},
    "tract_133": {"method": "tract", "epochs": 133},
}
SEEDS = range(5)
ALL_MODELS = {choices["model"] for choices in SETS["cifar100"]["subjects"].values()}


def _config(experiment, **choices):
    choices = {key.replace("__", "."): value for key, value in choices.items()}
    return to_tree(compose_config(experiment, choices | {"eval_every": 10_000}))


def _zoo(model="vgg11", seed=0, method="vanilla", epochs=200, **more):
    return _config("cifar100_zoo", model=model, seed=seed, method=method, epochs=epochs, **more)


def _truth(subject, arm, quantity):
    """Values of the seeds 0, 1, ..., as event files hold them (float32)."""
    level = {"top1": 70.0, "top5": 90.0}[quantity] + list(ARMS).index(arm)
    draw = np.random.default_rng([list(ZOO).index(subject), list(ARMS).index(arm), len(quantity), int(level)])
    return np.float32(draw.normal(level, 0.5, len(SEEDS))).astype(float)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two of the 36 networks, all three arms, five seeds."""
    runs = tmp_path_factory.mktemp("zoo")
    for subject, model in ZOO.items():
        for arm, choices in ARMS.items():
            for seed in SEEDS:
                values = {f"test/{q}": _truth(subject, arm, q)[seed] for q in ("top1", "top5")}
                write_final(runs, _zoo(model, seed, **choices), values)
    return runs


@pytest.fixture
def one(tmp_path):
    """One network, baseline and TrAct, two seeds: small enough to damage."""
    for method in ("vanilla", "tract"):
        for seed in range(2):
            write_final(tmp_path, _zoo(seed=seed, method=method), {"test/top1": 60.0 + seed, "test/top5": 80.0 + seed})
    return tmp_path


def _folder(runs, method="vanilla", seed=0):
    (folder,) = runs.glob(f"*/vgg11-{method}-s{seed}-*")
    return folder


def _json(capsys, *arguments):
    code = tables.main(["--format", "json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def _table(capsys, name, runs):
    _, (table,) = _json(capsys, "--table", name, "--runs", runs)
    return table


def _rows(table):
    return {tuple(row["words"].values()): row["cells"] for row in table["rows"]}


def _only(monkeypatch, subjects):
    """The layout without the other networks."""
    whole, zoo = table_layout(), SETS["cifar100"]
    zoo = zoo | {"subjects": {name: zoo["subjects"][name] for name in subjects}}
    for module in (paper, paper_sets):
        monkeypatch.setattr(module, "table_layout", lambda: whole | {"sets": SETS | {"cifar100": zoo}})


# -- the published numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("quantity", ["top1", "top5"])
def test_the_published_average_is_that_of_the_published_rows(arm, quantity):
    rows = [numbers[arm][quantity] for name, numbers in PUBLISHED["cifar100"].items() if name != "average"]
    assert len(rows) == 36
    ours = paper.average([Summary(5, *row) for row in rows], 2)
    assert [round(ours.mean, 2), round(ours.std, 2)] == PUBLISHED["cifar100"]["average"][arm][quantity]
    assert (ours.n, ours.mean) == (36, pytest.approx(np.mean(rows, axis=0)[0], rel=1e-12))


@pytest.mark.parametrize("quantity", ["top1", "top5"])
def test_the_published_count_is_that_of_the_published_rows(quantity):
    rows = [numbers for name, numbers in PUBLISHED["cifar100"].items() if name != "average"]
    treated, baseline = ([row[arm][quantity][0] for row in rows] for arm in ("tract", "baseline"))
    assert paper.better(treated, baseline) == (PUBLISHED["better_than_baseline"]["cifar100"]["tract"][quantity], 36)


def test_as_good_is_not_better_and_gaps_do_not_count():
    assert paper.better([1.0, 2.0, 3.0, None, 9.0], [1.0, 1.0, 4.0, 0.0, None]) == (1, 3)


def test_an_average_of_what_is_not_whole_is_none():
    whole = Summary(5, 70.126, 0.126)
    assert paper.average([whole, Summary(5, 71.0, 0.2)], 2) == Summary(2, pytest.approx(70.565), pytest.approx(0.165))
    assert paper.average([whole, Summary(0, None, None)], 2) == Summary(1, None, None)
    assert paper.average([whole, Summary(1, 71.0, None)], 2) == Summary(2, pytest.approx(70.565), None)


def test_every_cell_of_every_table_has_its_published_number():
    for name in table_layout()["tables"]:
        table = paper.build_paper_table(name, lambda experiment: [])
        absent = [cell.key for row in table.rows for cell in row.cells if cell.published is None]
        assert all((key.arm, key.quantity) == ("paper", "top5") for key in absent)
        assert len(absent) == (3 if name == "3" else 0)


def test_nothing_is_published_beside_the_layout():
    for name, spec in SETS.items():
        assert [subject for subject in PUBLISHED[name] if subject != "average"] == list(spec["subjects"])
        for arms in PUBLISHED[name].values():
            assert list(arms) == list(spec["arms"])
            assert {quantity for numbers in arms.values() for quantity in numbers} == set(spec["metrics"])
    assert list(PUBLISHED["runtime"]) == list(table_layout()["runtime"])


def test_published_numbers_are_possible():
    for name in SETS:
        for numbers in (numbers for arms in PUBLISHED[name].values() for numbers in arms.values()):
            means = [numbers[quantity][0] for quantity in ("top1", "top5") if quantity in numbers]
            assert means == sorted(means)
            assert all(0 < value < 100 for number in numbers.values() for value in number)


def test_published_overheads_are_those_of_the_published_times():
    """To the last digit printed: times of hours are printed to the minute, the others to the second."""
    for numbers in PUBLISHED["runtime"].values():
        plain, treated = numbers["baseline"]["seconds"][0], numbers["tract"]["seconds"][0]
        half = 30 if plain > 36_000 else 0.5
        low, high = (100 * ((treated + side * half) / (plain - side * half) - 1) for side in (-1, 1))
        assert low - 0.05 <= numbers["tract"]["overhead"][0] <= high + 0.05


# -- which runs belong to a cell ----------------------------------------------------------------


def _members(name, present=None):
    """All cohorts of a set, with runs of which nothing is known but their seeds; ``present``: {words: seeds}."""
    members = {cohort: paper_runs.Members() for cohort in cohorts(SETS[name])}
    for cohort, own in members.items():
        own.runs += [SimpleNamespace(seed=seed) for seed in (present or {}).get(cohort.words, ())]
    return members


def _selected(name, members):
    """The overrides of each run that the named commands select, by the experiments' own code."""
    spec, selected = SETS[name], []
    for item in missing(members, spec["seeds"]):
        sentence = missing_sentence(spec, item, dict.fromkeys(spec["arms"], ""))
        program, script, flag, *words = shlex.split(re.search("`(.*)`", sentence)[1])
        assert (program, script, flag) == ("python", f"experiments/{spec['experiment']}.py", "--submit")
        assert f'grid="{GRIDS[name]}"' in (ROOT / script).read_text()
        found = points(load_grid(GRIDS[name]), parse_overrides(words))
        count = int(re.search(r"missing: (\d+) run", sentence)[1])
        assert count == len([point for point in found if point.get("stage") != "pretrain"])
        selected += found
    return selected


def _wanted(cohort, seeds):
    return [cohort.choices | {"seed": seed} for seed in seeds]


def _comparable(points):
    return sorted(json.dumps({k: v for k, v in point.items() if k != "stage"}, sort_keys=True) for point in points)


@pytest.mark.parametrize("name", GRIDS)
def test_the_commands_for_everything_select_exactly_the_cells_runs(name):
    spec = SETS[name]
    selected = _selected(name, _members(name))
    wanted = [point for cohort in cohorts(spec) for point in _wanted(cohort, range(spec["seeds"]))]
    stages = 2 if name == "deit3" else 1  # a fine-tuning comes with the pre-training it starts from
    assert _comparable(selected) == _comparable(wanted * stages)
    assert len(missing(_members(name), spec["seeds"])) <= 4


def test_the_commands_for_all_networks_name_none():
    items = missing(_members("cifar100"), 5)
    assert [paper_runs.command(SETS["cifar100"], item) for item in items] == [
        "python experiments/cifar100_zoo.py --submit method=vanilla epochs=200 seed=0,1,2,3,4",
        "python experiments/cifar100_zoo.py --submit method=tract method.lambda_=0.1 epochs=200,133 seed=0,1,2,3,4",
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_commands_for_what_is_missing_select_exactly_that(data):
    name = data.draw(st.sampled_from(sorted(GRIDS)))
    seeds = SETS[name]["seeds"]
    some = [data.draw(st.sets(st.integers(0, seeds))) for _ in range(12)] + [set(range(seeds))] * 96
    present = {cohort.words: own for cohort, own in zip(cohorts(SETS[name]), some, strict=False)}
    wanted = []
    for cohort in cohorts(SETS[name]):
        free = [seed for seed in range(100) if seed not in present[cohort.words]]
        wanted += _wanted(cohort, free[: max(0, seeds - len(present[cohort.words]))])
    selected = _selected(name, _members(name, present))
    assert _comparable(selected) == _comparable(wanted * (2 if name == "deit3" else 1))


def test_the_command_of_table_5_selects_its_runs(tmp_path, capsys):
    command = re.search("`(.*)`", _table(capsys, "5", tmp_path)["named"][0])[1]
    configs = plan("detection_voc", "table5", parse_overrides(shlex.split(command)[3:]))
    assert sorted((c.method["name"], c.seed) for c in configs) == [(m, s) for m in ("tract", "vanilla") for s in (0, 1)]


def _chosen(point):
    """Enough of the grids: two networks of 36 with two seeds, and of transfer's predecessors its own."""
    return point.get("model") not in ALL_MODELS or (point["model"] in ZOO.values() and point["seed"] < 2)


@pytest.mark.parametrize("name", GRIDS)
def test_the_runs_of_the_grids_follow_the_recipe_and_find_their_cells(name, tmp_path):
    spec, made, named = SETS[name], {}, []
    for own in [name] if name != "transfer" else ["deit3", "transfer"]:
        for point in filter(_chosen, points(load_grid(GRIDS[own]), {})):
            if name != "transfer" or point.get("recipe.pretrain_epochs", 800) == 800:
                config = compose_config(SETS[own]["experiment"], point | {"runtime.runs": str(tmp_path)})
                made[prepare_folder(config)] = point
    members = members_of_set(spec, load_runs(tmp_path)[spec["experiment"]], named)
    assert not any("left out" in sentence for sentence in named)
    for cohort, own in members.items():
        assert len(own.runs) == (1 if name != "cifar100" else 2 * (cohort.subject in ZOO))
        for run in own.runs:
            assert cohort.choices.items() <= made[run.folder].items()
            assert made[run.folder].get("stage") != "pretrain"


def test_the_networks_stand_in_the_order_of_the_grid():
    models = [choices["model"] for choices in SETS["cifar100"]["subjects"].values()]
    assert models == load_grid("table1")["axes"]["model"]


LEFT_OUT = {
    "batch_size=64 instead of 128": {"batch_size": 64},
    "optim.lr=0.05 instead of 0.1": {"optim__lr": 0.05},
    "optim.weight_decay=0 instead of 0.0005": {"optim__weight_decay": 0.0},
    "optim.name=adam instead of sgd": {"optim": "adam", "optim__lr": 0.1, "optim__weight_decay": 5e-4},
    "label_smoothing=0.1 instead of 0": {"label_smoothing": 0.1},
    "max_steps=78200 instead of null": {"max_steps": 78_200},
    "schedule.gamma=0.1 instead of 0.2": {"schedule__gamma": 0.1},
    "data.mean=[0.0, 0.0, 0.0] instead of [0.507": {"data__mean": [0.0, 0.0, 0.0]},
    "data=imagefolder is never the paper's data": {"data": "imagefolder", "data__root": "here"},
}


@pytest.mark.parametrize("words", LEFT_OUT)
def test_a_run_of_another_recipe_is_left_out_and_says_by_what(one, capsys, words):
    folder = write_final(one, _zoo(seed=2, **LEFT_OUT[words]), {"test/top1": 99.0, "test/top5": 99.9})
    table = _table(capsys, "6", one)
    assert _rows(table)["VGG-11",][0]["seeds"] == [0, 1]
    (sentence,) = [line for line in table["named"] if str(folder) in line]
    assert sentence.startswith(f"{folder}: left out")
    assert words in sentence


def test_what_a_configuration_does_not_say_is_a_doubt_and_no_other_recipe(tmp_path, capsys):
    for seed in (0, 1):
        config = _zoo(seed=seed)
        del config["batch_size"], config["optim"]["momentum"]
        folder = write_final(tmp_path, config, {"test/top1": 60.0, "test/top5": 80.0})
    table = _table(capsys, "6", tmp_path)
    assert _rows(table)["VGG-11",][0]["seeds"] == [0, 1]
    (sentence,) = [line for line in table["named"] if "does not say" in line]
    assert "batch_size, optim.momentum, which are taken to be the paper's" in sentence
    assert str(folder.parent) in sentence
    assert "and 1 more" in sentence


NOT_OF_THE_PAPER = {
    "method.lambda_=0.2 instead of 0.1": {"method": "tract", "method__lambda_": 0.2},
    "epochs=100 instead of 200": {"epochs": 100},
    "epochs=133 instead of 200": {"epochs": 133},
    "model.name=resnet_small instead of squeezenet": {"model": "resnet_small"},
}


@pytest.mark.parametrize("words", NOT_OF_THE_PAPER)
def test_a_run_that_the_paper_has_not_is_of_no_cell_and_is_named(one, capsys, words):
    before = _table(capsys, "1", one)
    folders = [
        write_final(one, _zoo(seed=seed, **NOT_OF_THE_PAPER[words]), {"test/top1": 99.0, "test/top5": 99.9})
        for seed in (2, 3)
    ]
    after = _table(capsys, "1", one)
    assert after["rows"] == before["rows"]
    (sentence,) = set(after["named"]) - set(before["named"])
    assert sentence.startswith(f"{min(folders)} and 1 more: left out, none of the paper's runs: ")
    assert words in sentence


def test_runs_of_another_table_are_no_doubt_of_this_one(zoo, capsys):
    """Table 6 has no runs of 133 epochs, table 7 none of 200."""
    for name in ("6", "7"):
        assert not any("left out" in line for line in _table(capsys, name, zoo)["named"])


def test_runs_that_differ_in_what_the_recipe_leaves_open_share_no_mean(one, capsys):
    folder = write_final(one, _zoo(seed=2, precision="bf16"), {"test/top1": 60.0, "test/top5": 80.0})
    table = _table(capsys, "1", one)
    assert [cell["n"] for cell in _rows(table)["VGG-11",]] == [0, 2, 0]
    (sentence,) = [line for line in table["named"] if "differ in precision" in line]
    assert f"bf16 in {folder}" in sentence
    assert "fp32 in" in sentence


def test_another_place_of_the_data_is_no_other_recipe(one, capsys):
    write_final(one, _zoo(seed=2, data__root="/elsewhere"), {"test/top1": 62.0, "test/top5": 80.0})
    assert _rows(_table(capsys, "1", one))["VGG-11",][0]["seeds"] == [0, 1, 2]


def test_one_seed_twice_is_named_and_not_used(one, capsys):
    folder = _folder(one)
    shutil.copytree(folder, folder.with_name("copy"))
    table = _table(capsys, "1", one)
    assert _rows(table)["VGG-11",][0]["seeds"] == [1]
    assert any("the same run several times" in line and str(folder) in line for line in table["named"])


def test_mixed_commits_are_named(one, capsys):
    attempts = {"attempts": [ATTEMPT | {"commit": "f" * 40}]}
    (_folder(one) / "provenance.json").write_text(json.dumps(attempts))
    assert any("differ in commit" in line and "f" * 12 in line for line in _table(capsys, "1", one)["named"])


def test_too_few_seeds_are_named_with_the_command_for_the_rest(one, capsys):
    named = _table(capsys, "1", one)["named"]
    assert "fewer seeds than the paper's 5: VGG-11 / Baseline (2), VGG-11 / TrAct (2)" in "\n".join(named)
    assert any(
        "missing: 3 runs of VGG-11 (Baseline)" in line
        and "`python experiments/cifar100_zoo.py --submit model=vgg11 method=vanilla epochs=200 seed=2,3,4`" in line
        for line in named
    )


def test_an_unfinished_run_is_named_and_not_called_missing(one, capsys):
    folder = _folder(one)
    (folder / "result.json").unlink()
    named = _table(capsys, "1", one)["named"]
    assert any(str(folder) in line and "unfinished" in line for line in named)
    assert any("missing: 3 runs of VGG-11 (Baseline)" in line and "seed=2,3,4" in line for line in named)


def test_strict_is_content_with_a_whole_table_alone(zoo, one, capsys, monkeypatch):
    _only(monkeypatch, ZOO)
    assert tables.main(["--table", "1", "--runs", str(zoo), "--strict"]) == 0
    assert "Missing" not in capsys.readouterr().out
    assert tables.main(["--table", "1", "--runs", str(one), "--strict"]) == 1
    assert tables.main(["--table", "1", "--runs", str(one)]) == 0


# -- cells --------------------------------------------------------------------------------------

COLUMNS = {
    "1": [("baseline", "top1"), ("tract", "top1"), ("tract_133", "top1")],
    "6": [("baseline", "top1"), ("baseline", "top5"), ("tract", "top1"), ("tract", "top5")],
    "7": [("tract_133", "top1"), ("tract_133", "top5")],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_cell_is_numpys_beside_the_published_number(zoo, capsys, name):
    table = _table(capsys, name, zoo)
    assert [row["words"]["model"] for row in table["rows"]] == [n for n in PUBLISHED["cifar100"] if n != "average"]
    for (subject,), cells in _rows(table).items():
        for (arm, quantity), cell in zip(COLUMNS[name], cells, strict=True):
            mean, std = PUBLISHED["cifar100"][subject][arm][quantity]
            assert (cell["arm"], cell["quantity"], cell["published"]) == (arm, quantity, {"mean": mean, "std": std})
            if subject not in ZOO:
                assert (cell["n"], cell["mean"], cell["std"], cell["difference"]) == (0, None, None, None)
                continue
            truth = _truth(subject, arm, quantity)
            assert (cell["seeds"], cell["values"]) == (list(SEEDS), truth.tolist())
            assert (cell["n"], cell["mean"], cell["std"]) == (5, truth.mean(), truth.std(ddof=1))
            assert cell["difference"] == pytest.approx(truth.mean() - mean, rel=1e-12)
            assert len(cell["runs"]) == 5
    assert [cell["mean"] for cell in table["average"]["cells"]] == [None] * len(COLUMNS[name])
    assert not any("VGG-11" in line for line in table["named"])


def test_differences_are_scipys_and_holm_is_over_the_table(zoo, capsys):
    rows = _rows(_table(capsys, "6", zoo))
    found, p = [], []
    for subject in ZOO:
        cells = {(cell["arm"], cell["quantity"]): cell for cell in rows[subject,]}
        for quantity in ("top1", "top5"):
            oracle = stats.ttest_rel(_truth(subject, "tract", quantity), _truth(subject, "baseline", quantity))
            own = cells["tract", quantity]["paired"]
            assert cells["baseline", quantity]["paired"] is None
            assert (own["low"], own["high"]) == pytest.approx(oracle.confidence_interval(0.95), rel=1e-9)
            found.append(own["p_holm"])
            p.append(oracle.pvalue)
    assert found == pytest.approx(multipletests(p, method="holm")[1], rel=1e-9)


def test_ours_and_published_are_compared_by_welch_and_two_one_sided_tests(zoo, capsys):
    rows = _rows(_table(capsys, "6", zoo))
    for subject in ZOO:
        for cell in rows[subject,]:
            truth = _truth(subject, cell["arm"], cell["quantity"])
            published = (cell["published"]["mean"], cell["published"]["std"], 5)
            own, moments = cell["against_published"], (truth.mean(), truth.std(ddof=1), 5)
            oracle = stats.ttest_ind_from_stats(*moments, *published, equal_var=False)
            error = oracle.statistic and own["difference"] / oracle.statistic
            degrees = error**4 / sum((s**2 / 5) ** 2 / 4 for s in (moments[1], published[1]))
            half = stats.t.ppf(0.975, degrees) * error
            assert (own["low"], own["high"]) == pytest.approx((own["difference"] - half, own["difference"] + half))
            sides = [
                stats.ttest_ind_from_stats(moments[0] + sign * 0.5, *moments[1:], *published, False, way).pvalue
                for sign, way in ((1, "greater"), (-1, "less"))
            ]
            assert own["p_equivalence"] == pytest.approx(max(sides), rel=1e-6)
            assert (own["margin"], own["published_exact"]) == (0.5, False)


def test_the_page_shows_the_papers_tables_and_figures_that_have_runs(zoo):
    runs = load_runs(zoo)
    numbers = {run.folder: number for number, run in enumerate(runs["cifar100_zoo"])}
    *found, rest = paper_sections(runs, numbers)
    assert [section.title for section in found] == ["Paper: table 1", "Paper: table 6", "Paper: table 7"]
    others = [*(f"Table {number}" for number in range(2, 6)), *(f"Figure {number}" for number in range(3, 13))]
    assert rest.intro[0].endswith(f": {', '.join(others)}.")
    whole, differences, against = found[1].grids
    table = build_paper_table("6", runs.get)
    assert [[entry.text for entry in row] for row in whole.rows] == readable_rows(table)
    assert [[entry.text for entry in row] for row in differences.rows] == comparison_rows(table)
    assert [[entry.text for entry in row] for row in against.rows] == published_rows(table)
    assert {len(grid.columns) for grid in found[1].grids} == {len(row) for grid in found[1].grids for row in grid.rows}
    entry, cell = whole.rows[5][1], table.rows[5].cells[0]  # VGG-11, baseline, top-1
    assert [link.run for link in entry.links] == [numbers[run.folder] for run in cell.cell.runs.values()]
    assert (len(entry.links), entry.value) == (5, cell.ours.mean)


def test_wilcoxon_counts_each_network_once(zoo, capsys):
    table = _table(capsys, "6", zoo)
    for quantity, words in (("top1", "top-1"), ("top5", "top-5")):
        differences = [(_truth(s, "tract", quantity) - _truth(s, "baseline", quantity)).mean() for s in ZOO]
        (remark,) = [text for text in table["remarks"] if f"in {words} on" in text]
        assert f"of {len(ZOO)} rows: p {stats.wilcoxon(differences).pvalue:.3g}." in remark


def test_wilcoxon_ties_what_is_equal_to_the_rounding_of_event_files(tmp_path, capsys):
    """Baselines of 60 to 67; differences of 0.1, and of 0.3 up and down, that float32 spoils."""
    differences = [0.1, -0.1, 0.1, 0.3, -0.3, 0.3]
    subjects = list(SETS["cifar100"]["subjects"].items())[: len(differences)]
    for number, ((_, choices), difference) in enumerate(zip(subjects, differences, strict=True)):
        for method, value in (("vanilla", 60.0 + 1.37 * number), ("tract", 60.0 + 1.37 * number + difference)):
            config = _zoo(choices["model"], method=method)
            write_final(tmp_path, config, {"test/top1": value, "test/top5": value})
    (remark,) = [text for text in _table(capsys, "6", tmp_path)["remarks"] if "in top-1 on" in text]
    assert f"of 6 rows: p {wilcoxon_p(differences):.3g}." in remark


def test_averages_and_counts_are_those_of_the_printed_numbers(zoo, capsys, monkeypatch):
    _only(monkeypatch, ZOO)
    table = _table(capsys, "1", zoo)
    for cell in table["average"]["cells"]:
        truth = [_truth(subject, cell["arm"], "top1") for subject in ZOO]
        expected = np.mean([[round(t.mean(), 2), round(t.std(ddof=1), 2)] for t in truth], axis=0)
        assert (cell["mean"], cell["std"]) == pytest.approx(expected, rel=1e-12)
        assert cell["n"] == 2
        printed = PUBLISHED["cifar100"]["average"][cell["arm"]]["top1"]
        assert [cell["published"]["mean"], cell["published"]["std"]] == printed
    above = [sum(_truth(s, arm, "top1").mean() > _truth(s, "baseline", "top1").mean() for s in ZOO) for arm in ARMS]
    assert f"TrAct is above Baseline in top-1 on {above[1]} of the 2 rows that have both" in table["remarks"][0]


def _final(runs, experiment, values, **choices):
    config = _config(experiment, runtime__runs=str(runs), **choices)
    return write_final(runs, config, {f"test/{key}": value for key, value in values.items()})


def test_table_2(tmp_path, capsys):
    for epochs in (30, 60):
        for method in ("vanilla", "tract"):
            for model in ("imagenet_resnet50", "imagenet_resnet18"):
                values = {"top1": epochs + 0.5 * (method == "tract"), "top5": 90.0} if "50" in model else {"top1": 1.0}
                _final(tmp_path, "imagenet_resnet", values, model=model, epochs=epochs, method=method)
    table = _table(capsys, "2", tmp_path)
    assert [[cell["mean"] for cell in row] for row in _rows(table).values()] == [
        [30.0, 90.0, 30.5, 90.0],
        [60.0, 90.0, 60.5, 90.0],
        [None, None, None, None],
    ]
    assert _rows(table)["30",][2]["difference"] == pytest.approx(30.5 - 73.48)
    assert _rows(table)["30",][2]["paired"]["mean"] == 0.5
    assert len(table["named"]) == 2
    assert all("epochs=90" in line for line in table["named"])


def _deit(runs, epochs=400, before="vanilla", method="vanilla", top1=80.0, **more):
    """A pre-training with the method ``before``, and the fine-tuning with ``method`` that starts from it."""
    first = {"recipe__pretrain_epochs": epochs, "method": before} | more
    name = _final(runs, "imagenet_deit", {"top1": 1.0, "top5": 2.0}, **first).name
    then = {"recipe__pretrain_epochs": epochs, "method": method, "stage": "finetune", "start_from": name}
    return _final(runs, "imagenet_deit", {"top1": top1, "top5": 95.0}, **then)


def test_table_3_takes_the_fine_tuned_run(tmp_path, capsys):
    _deit(tmp_path, epochs=400)
    _deit(tmp_path, epochs=800, top1=82.0)
    rows = _rows(_table(capsys, "3", tmp_path))
    assert list(rows)[:3] == [
        ("ViT-S", "400", "DeiT III paper"),
        ("ViT-S", "400", "reproduction"),
        ("ViT-S", "400", "TrAct"),
    ]
    assert [cell["mean"] for cell in rows["ViT-S", "400", "reproduction"]] == [80.0, 95.0]
    assert [cell["mean"] for cell in rows["ViT-S", "800", "reproduction"]] == [82.0, 95.0]
    assert rows["ViT-S", "800", "reproduction"][0]["difference"] == pytest.approx(82.0 - 81.97)
    own = rows["ViT-S", "400", "DeiT III paper"]
    assert [cell["published"] for cell in own] == [{"mean": 80.4, "std": None}, None]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"before": "tract"}, "start.method.name=tract instead of vanilla"),
        ({"batch_size": 1024}, "start.batch_size=1024 instead of 2048"),
        ({"max_steps": 250_000}, "start.max_steps=250000 instead of null"),
    ],
)
def test_what_a_run_started_from_must_be_the_papers_too(tmp_path, capsys, more, words):
    folder = _deit(tmp_path, **more)
    table = _table(capsys, "3", tmp_path)
    assert _rows(table)["ViT-S", "400", "reproduction"][0]["n"] == 0
    assert any(str(folder) in line and words in line for line in table["named"])


def test_a_start_that_is_not_there_is_named(tmp_path, capsys):
    folder = _deit(tmp_path)
    start_from = yaml.safe_load((folder / "config.yaml").read_text())["start_from"]
    shutil.rmtree(folder.parent / start_from)
    table = _table(capsys, "3", tmp_path)
    assert _rows(table)["ViT-S", "400", "reproduction"][0]["n"] == 0
    assert any(f"start_from={start_from} is no run folder here" in line for line in table["named"])


def test_table_4_has_a_method_per_row_and_follows_the_start_to_the_pre_training(tmp_path, capsys):
    for epochs, data in ((800, "cifar10"), (400, "flowers102")):
        start_from = f"imagenet_deit/{_deit(tmp_path, epochs=epochs).name}"
        _final(tmp_path, "transfer", {"top1": 98.0}, data=data, start_from=start_from)
    _final(tmp_path, "transfer", {"top1": 99.0}, data="cifar100", start_from="timm:deit3_small_patch16_224.fb_in1k")
    table = _table(capsys, "4", tmp_path)
    assert table["columns"] == ["CIFAR-10", "CIFAR-100", "Flowers-102", "Stanford Cars"]
    assert [cell["mean"] for cell in _rows(table)["Baseline",]] == [98.0, None, None, None]
    named = "\n".join(table["named"])
    assert "start.start.epochs=400 instead of 800" in named
    assert "start_from=timm:deit3_small_patch16_224.fb_in1k is no run folder here" in named


def test_images_compressed_again_are_no_data_of_table_4(tmp_path, capsys):
    start_from = f"imagenet_deit/{_deit(tmp_path, epochs=800).name}"
    choices = {"data": "imagefolder", "data__root": "here", "epochs": 200, "start_from": start_from}
    folder = _final(tmp_path, "transfer", {"top1": 98.0}, **choices)
    table = _table(capsys, "4", tmp_path)
    assert [cell["n"] for cell in _rows(table)["Baseline",]] == [0] * 4
    assert table["named"][0].startswith(f"{folder}: left out, data=imagefolder is never the paper's data")


def test_table_5_is_from_0_to_1(tmp_path, capsys):
    for method, values in {"vanilla": (65.0, 66.5), "tract": (67.0, 67.75)}.items():
        for seed, value in enumerate(values):
            config = _zoo(seed=seed, method=method) | {"experiment": "detection_voc"}
            write_final(tmp_path, config, {"test/map": value})
    table = _table(capsys, "5", tmp_path)
    cells = [row[0] for row in _rows(table).values()]
    assert [cell["mean"] for cell in cells] == pytest.approx([0.6575, 0.67375])
    assert cells[1]["std"] == pytest.approx(np.std([0.67, 0.6775], ddof=1))
    assert cells[1]["paired"]["mean"] == pytest.approx(0.01625)
    assert table["named"] == []
    tables.main(["--table", "5", "--runs", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| TrAct    | 0.674 ± 0.005 (2) [0.671 ± 0.004, +0.003]" in text
    assert "| +0.016 [−0.031, +0.064] (2) |" in text, "the paper's whole effect is 0.012"
    assert "| +0.003 [" in text
    tables.main(["--table", "5", "--runs", str(tmp_path), "--explain", "TrAct"])
    assert "| 0.670 " in capsys.readouterr().out


# -- formats ------------------------------------------------------------------------------------


def test_all_formats_say_the_same(zoo, capsys):
    table = _table(capsys, "6", zoo)
    texts = {}
    for form in ("md", "latex", "csv"):
        assert tables.main(["--table", "6", "--runs", str(zoo), "--format", form]) == 0
        texts[form] = capsys.readouterr().out
    cells = [cell for row in [*table["rows"], table["average"]] for cell in row["cells"]]
    lines = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert len(lines) == len(cells) == 37 * 4
    for line, cell in zip(lines, cells, strict=True):
        assert (line["subject"], line["arm"], line["quantity"]) == (cell["subject"], cell["arm"], cell["quantity"])
        for name in ("mean", "std", "difference"):
            assert (float(line[name]) if line[name] else None) == cell[name]
        assert float(line["published_mean"]) == cell["published"]["mean"]
        assert line["runs"].split(";") == (cell["runs"] or [""])
        assert line["paired_p_holm"] == str((cell["paired"] or {}).get("p_holm") or "")
    assert _grid(texts["md"], "|") == _grid(texts["latex"], "&")
    rows = {row[0]: row for row in _grid(texts["md"], "|")[:38]}
    first = table["rows"][0]["cells"][0]
    sign = "+" if first["difference"] >= 0 else "−"
    assert rows["SqueezeNet"][1] == (
        f"{first['mean']:.2f} ± {first['std']:.2f} (5) [69.45 ± 0.30, {sign}{abs(first['difference']):.2f}]"
    )
    assert rows["MobileNet"][1] == "– (0) [66.99 ± 0.16]"
    assert rows["model"] == ["model", "Baseline top-1", "Baseline top-5", "TrAct top-1", "TrAct top-5"]


@pytest.mark.parametrize(
    ("ours", "published", "words"),
    [
        (Summary(5, 70.126, 0.2), paper.Published(69.66, 0.2), "70.13 ± 0.20 (5) [69.66 ± 0.20, +0.47]"),
        (Summary(1, 69.0, None), paper.Published(69.66, None), "69.00 (1) [69.66, −0.66]"),
        (Summary(0, None, None), paper.Published(69.66, 0.2), "– (0) [69.66 ± 0.20]"),
        (Summary(2, 69.0, 0.5), None, "69.00 ± 0.50 (2) [–]"),
        (None, paper.Published(80.4, None), "[80.40]"),
        (None, None, "–"),
    ],
)
def test_a_cell_reads_ours_published_difference(ours, published, words):
    assert readable_cell(paper.PaperCell(paper.Key("", "tract", "top1"), ours, published), 2) == words


def _grid(text, separator):
    """Header and rows of Markdown or LaTeX tables as plain words."""
    signs = {r"$\pm$": "±", "$-$": "−", r"$\Delta$": "Δ", r"\textendash{}": "–", r"\textless{}": "<", "{}[": "["}
    for pattern, sign in signs.items():
        text = text.replace(pattern, sign)
    lines = [line for line in text.splitlines() if line.startswith("|") or line.endswith(r"\\")]
    words = [[word.strip() for word in line.removesuffix(r"\\").strip("|").split(separator)] for line in lines]
    return [row for row in words if not row[0].startswith(":")]


def test_latex_is_balanced_and_its_rows_are_as_long_as_its_columns(zoo, capsys):
    tables.main(["--table", "6", "--runs", str(zoo), "--format", "latex"])
    text = capsys.readouterr().out
    assert sorted(re.findall(r"\\begin{(\w+)}", text)) == sorted(re.findall(r"\\end{(\w+)}", text))
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    for columns, body in re.findall(r"\\begin{tabular}{(\w+)}(.*?)\\end{tabular}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}


def test_all_tables_are_written_into_files_and_read_every_run_once(zoo, tmp_path, capsys, monkeypatch):
    asked, load = [], tables.runs_of
    monkeypatch.setattr(
        tables, "runs_of", lambda root, experiment, cache: asked.append(experiment) or load(root, experiment, cache)
    )
    assert tables.main(["--table", "all", "--runs", str(zoo), "--out", str(tmp_path)]) == 0
    assert sorted(asked) == sorted(spec["experiment"] for spec in SETS.values())
    names = [*(f"table-{number}.md" for number in range(1, 8)), "section-4.6.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--table", "8"], "invalid choice: '8'"),
        (["--table", "1", "--experiment", "cifar100_zoo"], "--table decides the experiment itself"),
        (["--table", "1", "--best"], "--table decides the best itself"),
        (["--table", "1", "--runs", "absent"], "absent"),
        (["--runtime", "a.json"], "--runtime is for --table runtime"),
        (["--table", "runtime", "--runtime", "absent.json"], "expected --runtime to be what experiments/runtime.py"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(one, capsys, arguments, sentence):
    runs = [] if "--runs" in arguments else ["--runs", str(one)]
    assert tables.main([*arguments, *runs]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


# -- run time -----------------------------------------------------------------------------------


def _measured(**changes):
    config = to_tree(compose_config("cifar_vit", changes))
    return {"vanilla": [0.020, 0.024, 0.030], "tract": [0.032, 0.030, 0.033], "config": config}


def _runtime(tmp_path, capsys, **measured):
    file = tmp_path / "runtime.json"
    file.write_text(json.dumps({"settings": measured, "hardware": {"device": "a GPU"}}))
    _, (table,) = _json(capsys, "--table", "runtime", "--runtime", file)
    return table


def test_run_times_are_medians_of_the_blocks_times_the_steps_of_a_training(tmp_path, capsys):
    table = _runtime(tmp_path, capsys, cifar_vit=_measured())
    first = _rows(table)["ViT on CIFAR-10, 100 epochs",]
    steps = 100 * (50_000 // 128)
    assert [cell["mean"] for cell in first] == pytest.approx([0.024 * steps, 0.032 * steps, 100 * (32 / 24 - 1)])
    assert first[2]["quartiles"] == pytest.approx(100 * (np.quantile([32 / 20, 30 / 24, 33 / 30], [0.25, 0.75]) - 1))
    assert [cell["difference"] for cell in first] == pytest.approx([936 - 1091, 1248 - 1197, 100 / 3 - 9.7])
    assert [cell["n"] for row in list(_rows(table).values())[1:] for cell in row] == [0] * 6
    assert "a GPU" in table["remarks"][0]
    (sentence,) = table["named"]
    assert "missing: the run time of ViT-S on ImageNet, 800 epochs; ViT-B on ImageNet, 400 epochs" in sentence


def test_csv_has_the_quartiles_of_run_times(tmp_path, capsys):
    table = _runtime(tmp_path, capsys, cifar_vit=_measured())
    arguments = ["--table", "runtime", "--runtime", str(tmp_path / "runtime.json"), "--format", "csv"]
    assert tables.main(arguments) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    cells = [cell for row in table["rows"] for cell in row["cells"]]
    own = [[float(number) for number in filter(None, line["quartiles"].split(";"))] for line in lines]
    assert own == [cell.get("quartiles", []) for cell in cells]
    assert sum(map(bool, own)) == 3


def test_the_steps_of_a_training_are_those_of_its_recipe():
    images = {"cifar_vit": 50_000, "deit_small": 1_281_167, "deit_base": 1_281_167}
    for spec in table_layout()["runtime"].values():
        epochs = spec["recipe"].get("epochs", 100)
        batch = spec["recipe"]["batch_size"] * (1 if spec["setting"] == "cifar_vit" else 8)
        assert spec["steps"] == epochs * (images[spec["setting"]] // batch)


def test_the_measured_settings_are_those_of_the_script(tmp_path, capsys):
    from experiments.runtime import SETTINGS

    measured = {}
    for spec in table_layout()["runtime"].values():
        setting = SETTINGS[spec["setting"]]
        config = to_tree(compose_config(setting.experiment, setting.changes | {"method": "vanilla"}))
        measured[spec["setting"]] = _measured() | {"config": config}
    table = _runtime(tmp_path, capsys, **measured)
    assert table["named"] == []
    assert _rows(table)["ViT-S on ImageNet, 800 epochs",][0]["mean"] == pytest.approx(0.024 * 800 * 625)


def test_a_run_time_of_another_recipe_is_left_out(tmp_path, capsys):
    table = _runtime(tmp_path, capsys, cifar_vit=_measured(batch_size=32))
    assert _rows(table)["ViT on CIFAR-10, 100 epochs",][0]["n"] == 0
    assert any("batch_size=32 instead of 128" in line for line in table["named"])


@pytest.mark.parametrize("damage", [{"tract": [1.0]}, {"vanilla": "fast"}, {"tract": [0.0, 1.0, 1.0]}])
def test_damaged_run_times_are_one_sentence(tmp_path, capsys, damage):
    file = tmp_path / "runtime.json"
    file.write_text(json.dumps({"settings": {"cifar_vit": _measured() | damage}}))
    assert tables.main(["--table", "runtime", "--runtime", str(file)]) == 2
    assert "cifar_vit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        5,
        {"settings": [1]},
        {"settings": {"cifar_vit": 5}},
        {"settings": {"cifar_vit": {"config": 5}}},
        {"settings": {}, "sizes": 5},
        {"settings": {}, "hardware": [1]},
        {"settings": {"cifar_vit": {"vanilla": [10**400], "tract": [1], "config": {}}}},
    ],
)
def test_what_is_no_measurement_of_run_times_is_one_sentence(tmp_path, capsys, content):
    file = tmp_path / "runtime.json"
    file.write_text(json.dumps(content))
    assert tables.main(["--table", "runtime", "--runtime", str(file)]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), f"got {file}; measure it again." in error) == (1, True)
