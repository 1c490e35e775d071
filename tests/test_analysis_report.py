"""The report's data and its HTML, read back by a parser; what a browser makes of it is tested elsewhere."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from analysis import report
from analysis.costs import cost_of, device_hours
from analysis.curves import curves_of, packed, thin
from analysis.load import load_run
from analysis.page.parts import picture
from analysis.rendering import caption, header, readable_row, to_plain
from analysis.tables import tables_of
from tests.run_folders import ATTEMPT, configuration, curve, write_run

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "analysis" / "page"
HOSTILE = "<script>steal()</script><img src=x onerror=steal()>\"' $\\frac$ &amp; \u2028"
VOID = ("meta", "link", "input", "br", "img", "use")


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text within), in the order of their start."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, words in self._open:
            words.append(data)

    def all(self, tag, **attributes):
        return [
            ("".join(words), attrs)
            for own, attrs, words in self.elements
            if own == tag and all(attrs.get(key) == value for key, value in attributes.items())
        ]

    def table(self, name):
        """[[(text, value)]] of the body of a table, read cell by cell in document order."""
        start = next(i for i, (tag, attrs, _) in enumerate(self.elements) if tag == "table" and attrs["id"] == name)
        rows = []
        for tag, attrs, words in self.elements[start + 1 :]:
            if tag == "table":
                break
            if tag == "tr":
                rows.append([])
            if tag == "td":
                rows[-1].append((" ".join("".join(words).split()), attrs["data-value"]))
        return [row for row in rows if row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two experiments; runs of every state."""
    root = tmp_path_factory.mktemp("report") / "runs"
    attempts = (ATTEMPT | {"world_size": 2, "hardware": {"device": "NVIDIA H200", "host": "a"}},)
    for method in ("vanilla", "tract"):
        for seed in range(3):
            seconds = {"seconds": 1800.0 * (1 + seed)}
            write_run(root, configuration(seed, method), curve(seed, method), attempts=attempts, result=seconds)
    write_run(root, configuration(3, "tract"), [70.0, 71.0], finished=False, attempts=attempts)
    failure = {"kind": "out-of-memory", "reason": "CUDA out of memory", "step": 7, "traceback": ["line <1>"]}
    write_run(root, configuration(3, "vanilla"), [70.0], finished=False, attempts=(ATTEMPT,), failure=failure)
    write_run(root, configuration(4, "tract"), [70.0] * 5, result={"metrics": {"test/top1": 1.0}})
    for method in ("vanilla", "tract"):
        write_run(root, configuration(0, method, model="big"), curve(0, method))
    write_run(root, configuration(), [50.0] * 5, experiment="other", result={"primary_metric": "test/loss"})
    return root


@pytest.fixture(scope="module")
def page(runs):
    return Page(_written(runs))


def _written(runs, *arguments):
    out = runs.parent / "report.html"
    assert report.main(["--runs", str(runs), "--out", str(out), *arguments]) == 0
    return out.read_text(encoding="utf-8")


def _unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


# -- curves -----------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 40))
def test_a_thinned_curve_keeps_its_ends_and_its_extremes_everywhere(values, most):
    kept = thin(values, most)
    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert {min(values), max(values)} <= {values[i] for i in kept}
    stretch = -(-len(values) // ((most - 2) // 2))
    for i, value in enumerate(values):  # no point lies beyond what is kept near it
        near = [values[k] for k in kept if abs(k - i) <= stretch]
        assert min(near) <= value <= max(near)


def test_a_short_curve_is_not_thinned():
    assert thin([3.0, 1.0, 2.0, 5.0], 4) == [0, 1, 2, 3]


def test_what_is_packed_is_what_the_events_hold(tmp_path):
    folder = write_run(tmp_path, configuration(epochs=70), curve(0, "vanilla", 70))
    with SummaryWriter(str(folder)) as writer:
        for step, value in ((0, 1.5), (7, float("nan")), (9, float("inf")), (40, -2.25)):
            writer.add_scalar("train/odd", value, step)
        writer.add_scalar("time/epoch_seconds", 1.0, 1)
    run = load_run(folder)
    curves = _unpacked(packed(run))["curves"]
    assert list(curves) == ["test/loss", "test/top1", "train/loss", "train/odd"]
    assert curves["train/odd"] == {"axis": "step", "x": [0, 40], "y": [1.5, -2.25], "points": 4, "infinite": 2}
    for tag in ("test/loss", "test/top1"):
        truth = run.curve(tag)
        assert np.cumsum(curves[tag]["x"]).tolist() == list(truth)
        assert curves[tag]["y"] == pytest.approx(list(truth.values()), rel=1e-5)
    loss = curves["train/loss"]
    steps = np.cumsum(loss["x"]).tolist()
    assert (loss["points"], steps[0], steps[-1]) == (700, 0, 699)
    assert 250 < len(steps) <= 500
    assert loss["y"] == pytest.approx([1 / (step + 1) for step in steps], rel=1e-5)


def test_a_curve_without_a_finite_point_is_empty(tmp_path):
    folder = write_run(tmp_path, configuration(), [float("nan")] * 5)
    assert curves_of(load_run(folder))["test/top1"] == {"axis": "epoch", "x": [], "y": [], "points": 5, "infinite": 5}


def test_all_that_is_known_of_a_run_is_packed(runs):
    (folder,) = (runs / "demo").glob("small-vanilla-s3-*")
    run = load_run(folder)
    known = _unpacked(packed(run))
    assert known["problems"] == [problem.text for problem in run.problems] != []
    assert known["command"] == f"python experiments/demo.py --resume {folder}"
    assert known["traceback"] == "line <1>"
    assert "depth: 5" in known["config"]
    (attempt,) = (dict(pairs) for pairs in known["attempts"])
    assert attempt["commit"] == "0123456789ab"
    assert (attempt["versions"], attempt["device"]) == ("torch 2.15.0", "cpu")


# -- costs ------------------------------------------------------------------------------


def _run_of(root, seed, attempts, finished=True, seconds=None, epochs=()):
    result = None if seconds is None else {"seconds": seconds}
    folder = write_run(root, configuration(seed), curve(0, "vanilla"), finished, attempts, result=result)
    with SummaryWriter(str(folder)) as writer:
        for epoch, value in enumerate(epochs, start=1):
            writer.add_scalar("time/epoch_seconds", value, epoch)
    return load_run(folder)


def test_device_hours_are_seconds_times_ranks(tmp_path):
    four = ATTEMPT | {"world_size": 4, "hardware": {"device": "NVIDIA H200"}}
    one = ATTEMPT | {"world_size": 1}
    runs = [
        _run_of(tmp_path, 0, (four,), seconds=900.0),  # an hour
        _run_of(tmp_path, 1, (one, one), seconds=7200.0, epochs=[1.0]),  # the result counts, not the epochs
        _run_of(tmp_path, 2, (four,), finished=False, epochs=[900.0, 900.0]),  # what is evaluated
        _run_of(tmp_path, 3, (one,), finished=False),  # unknown
        _run_of(tmp_path, 4, (four, one), seconds=3600.0),  # the last attempt's ranks
        _run_of(tmp_path, 5, (ATTEMPT,), seconds=1800.0),  # ranks not recorded
        _run_of(tmp_path, 6, (one,), seconds=float("inf")),  # no time
    ]
    assert [device_hours(run) for run in runs] == [1.0, 2.0, 2.0, None, 1.0, 0.5, None]
    cost = cost_of(runs)
    assert (cost.hours, cost.hardware) == (6.5, ("NVIDIA H200", "cpu"))
    assert (cost.unknown, cost.partial, cost.repeated, cost.guessed) == (2, 1, 2, 2)
    assert cost_of(runs[3:4]).hours is None


# -- the page ---------------------------------------------------------------------------


def test_every_cell_is_the_tables(runs, page):
    for number, table in enumerate(tables_of(runs), start=1):
        cells = page.table(f"section-{number}-table-1")
        for row, own in zip(cells, table.rows, strict=True):
            for (text, _), words in zip(row, readable_row(table, own), strict=True):
                assert re.fullmatch(re.escape(words) + r"( seed .*)?", text)
        assert caption(table) in [text for text, _ in page.all("p", **{"class": "caption"})]
        assert set(header(table)) <= {text for text, _ in page.all("button", **{"class": "sort"})}


def test_cells_are_sorted_by_the_numbers_behind_them(runs, page):
    for number, table in enumerate(tables_of(runs), start=1):
        cells = page.table(f"section-{number}-table-1")
        for row, own in zip(cells, to_plain(table)["rows"], strict=True):
            values = list(own["settings"].values())
            for cell in own["cells"]:
                values.append(cell["mean"])
                if cell["difference"] is not None:
                    values += [cell["difference"][key] for key in ("mean", "p_t", "detectable")]
            assert [value for _, value in row] == ["" if value is None else str(value) for value in values]


def test_every_cell_leads_to_its_runs(runs, page):
    table = tables_of(runs)[0]
    rows = {attrs["id"]: text for text, attrs in page.all("tr") if attrs.get("id")}
    links = [(text, rows[attrs["href"][1:]]) for text, attrs in page.all("a") if attrs["href"].startswith("#run-")]
    for row in table.rows:
        for cell in row.cells.values():
            for seed, run in cell.runs.items():
                value = f"{cell.values[seed]:.2f}"
                alone = f"{value} (1)" if len(cell.runs) == 1 else f"seed {seed}: {value}"
                assert any(text == alone and run.folder.name in target for text, target in links)
                if len(cell.runs) > 1:
                    paired = [target for text, target in links if re.fullmatch(f"seed {seed}, .*: {value}", text)]
                    assert any(run.folder.name in target for target in paired)


def test_the_head_counts_runs_by_state(runs, page):
    (facts,) = (text for text, _ in page.all("dl", **{"class": "facts"}))
    for words in ("9 finished", "1 unfinished", "1 failed", "1 refused", "NVIDIA H200 (7 runs)", "cpu (5 runs)"):
        assert words in facts
    assert "0123456789ab (12 runs)" in facts
    assert "2.15.0 (12 runs)" in facts
    assert str(runs.resolve()) in facts


def test_the_runs_are_listed_with_their_numbers(runs, page):
    rows = page.table("section-4-table-1")
    assert sorted((row[1][0], row[0][0]) for row in rows) == sorted(path.parts[-2:] for path in runs.glob("*/*"))
    listed = {row[0][0]: row for row in rows if row[1][0] == "demo"}
    folders = list(listed)
    (name,) = (name for name in folders if name.startswith("small-tract-s1"))
    final = float(np.float32(curve(1, "tract")[-1]))
    texts = [text for text, _ in listed[name]]
    assert texts == [name, "demo", "finished", "tract", "1", f"{final:.2f}", "5/5", "2", "1"]
    values = [value for _, value in listed[name]]
    assert values[4:] == ["1", str(final), "5", "2.0", "1"]
    (name,) = (name for name in folders if name.startswith("small-tract-s3"))
    texts = [text for text, _ in listed[name]]
    assert texts[2:] == ["unfinished", "tract", "3", "–", "2/5", "–", "1"]
    assert [value for _, value in listed[name]][5:8] == ["", "2", ""]


def test_every_run_is_packed_under_its_number(page):
    packs = [_unpacked(text) for text, _ in page.all("script", type="text/plain")]
    buttons = {attrs["data-run"]: text for text, attrs in page.all("button", **{"class": "open"})}
    assert {str(number): known["name"] for number, known in enumerate(packs)} == buttons


def test_every_doubt_of_the_tables_is_said_once_and_grouped(runs, page):
    named = [sentence for table in tables_of(runs) for sentence in table.named]
    groups = {text.split("\n")[1].strip(): text for text, _ in page.all("details", **{"class": "group"})}
    said = "".join(groups.values())
    assert len(named) == 7  # two of them on runs that stand alone
    assert all(said.count(sentence) == 1 for sentence in named)
    titles = [title.rpartition(" (")[0] for title in groups]
    assert titles == [
        "Failed",
        "Finished, but kept out of every mean",
        "Missing runs, and runs that differ in what they were made with",
        "Unfinished",
    ]
    assert "final test/top1 is 70.0 in the events but 1.0" in groups["Finished, but kept out of every mean (1)"]


def test_a_failed_run_says_why_and_how_to_go_on(runs, page):
    (row,) = page.table("section-5-table-1")
    (folder,) = (runs / "demo").glob("small-vanilla-s3-*")
    name, kind, reason, way_out, *_ = (text for text, _ in row)
    assert (name, kind, reason) == (folder.name, "out-of-memory", "CUDA out of memory")
    assert "micro_batch" in way_out
    assert any(f"--resume {folder}" in text for text, _ in page.all("details", **{"class": "group"}))


def test_the_cost_names_hardware_and_what_is_not_in_it(page):
    rows = [[text for text, _ in row] for row in page.table("section-6-table-1")]
    assert rows[0][:4] == ["demo", "tract", "6", "6"]  # 2 ranks × (0.5 + 1 + 1.5) hours
    assert "NVIDIA H200" in rows[0][4]
    assert rows[0][5] == "3 runs of unknown time"
    assert rows[2][:4] == ["other", "vanilla", "1", "–"]


def test_nothing_is_fetched_and_nothing_else_may_run(runs, page):
    keys = ("src", "href", "srcset", "action", "poster", "data", "xlink:href")
    addresses = [attrs[key] for _, attrs, _ in page.elements for key in keys if key in attrs]
    assert {address[:1] for address in addresses} <= {"#", "d"}
    assert {address for address in addresses if not address.startswith("#")} == {"data:,"}
    assert not any(key == "style" or key.startswith("on") for _, attrs, _ in page.elements for key in attrs)
    assert not re.search(r"url\((?!#)|@import", (PAGE / "page.css").read_text())
    ((_, meta),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    (style,), (script,) = page.all("style"), page.all("script", type=None)
    for kind, (text, _) in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in meta["content"]
    assert meta["content"].startswith("default-src 'none';")


def test_ids_are_unique_and_all_references_lead_somewhere(page):
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in page.elements:
        for key in ("href", "for", "aria-labelledby", "data-table"):
            if key in attrs and attrs[key] != "data:,":
                assert attrs[key].removeprefix("#") in ids
        for value in attrs.values():
            assert set(re.findall(r"url\(#(.*?)\)", value or "")) <= set(ids)


def test_figures_are_drawn_within_the_page(page):
    texts = [(text, attrs["aria-label"]) for text, attrs in page.all("svg")]
    assert [alt.partition(":")[0] for _, alt in texts] == ["demo", "other"]
    assert "vanilla (n = 3)" in texts[0][0]
    assert "tract (n = 3)" in texts[0][0]
    assert all("test/top1 against epoch" in alt or "test/loss against epoch" in alt for _, alt in texts)


def test_two_figures_alike_share_no_id():
    figure, axes = plt.subplots()
    axes.plot([1, 2], [3, 4])
    try:
        one, two = (re.findall(r'id="(.*?)"', picture(figure, name, "x").svg) for name in ("a", "b"))
    finally:
        plt.close(figure)
    assert one
    assert not set(one) & set(two)


def test_hostile_words_stay_words(tmp_path):
    runs = tmp_path / "runs"
    attempt = ATTEMPT | {"commit": "<b>", "command": HOSTILE, "hardware": {"device": HOSTILE}, "world_size": HOSTILE}
    for seed, method in ((0, "vanilla"), (0, HOSTILE), (1, HOSTILE)):
        config = configuration(seed, method, lr=seed, note=HOSTILE) | {"experiment": "<i>"}
        config["optim"][HOSTILE] = method
        config["model"]["name"] = "safe"
        writable, unnamed = {**config, "method": {"name": "m"}}, {"config_hash": None}
        folder = write_run(runs, writable, [70.0] * 5, attempts=(attempt,), experiment="<i>", result=unnamed)
        (folder / "config.yaml").write_text(json.dumps(config))
        folder.rename(folder.with_name(HOSTILE.replace("/", "") + f"-{method == HOSTILE}-{seed}"))
    failure = {"kind": HOSTILE, "reason": HOSTILE, "host": HOSTILE, "when": HOSTILE, "traceback": [HOSTILE]}
    write_run(runs, configuration(7), [70.0], finished=False, failure=failure, experiment="<i>")
    page = Page(_written(runs))
    assert not page.all("img")
    assert not page.all("i") + page.all("b")
    assert [attrs.get("type") for _, attrs in page.all("script")] == ["text/plain"] * 4 + [None]
    assert all(re.fullmatch("[A-Za-z0-9+/=]+", text) for text, _ in page.all("script", type="text/plain"))
    row = page.table("section-4-table-1")[0]
    assert [text for text, _ in row][1:3] == [" ".join(HOSTILE.split())] * 2
    packs = [_unpacked(text) for text, _ in page.all("script", type="text/plain")]
    assert HOSTILE in dict(packs[0]["attempts"][0])["command"]
    assert packs[-1]["traceback"] == HOSTILE
    assert any(HOSTILE.partition("</")[0] in text for text, _ in page.all("text"))  # a legend


def test_runs_of_one_experiment_alone(runs):
    page = Page(_written(runs, "--experiment", "other"))
    assert [text for text, _ in page.all("h2")] == [
        "Experiment other", "Paper: not run yet", "Runs", "Failures and doubts", "Cost",
    ]  # fmt: skip
    assert "one run alone" in page.all("section", id="section-4")[0][0]


def test_where_nothing_is_doubtful_it_says_so(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", configuration(seed), curve(seed, "vanilla"))
    page = Page(_written(tmp_path / "runs"))
    assert "None: every run has finished" in page.all("section", id="section-4")[0][0]


def test_without_a_readable_run_there_is_a_page_all_the_same(tmp_path):
    (tmp_path / "runs" / "demo" / "broken").mkdir(parents=True)
    page = Page(_written(tmp_path / "runs"))
    assert [text for text, _ in page.table("section-3-table-1")[0]][:4] == ["broken", "demo", "unfinished", "–"]


# -- look -------------------------------------------------------------------------------


def _schemes():
    """The style sheet's colours: {name: (red, green, blue)} of the light and of the dark scheme."""
    found = re.findall(r"--([\w-]+): light-dark\(#([0-9a-f]{6}), #([0-9a-f]{6})\)", (PAGE / "page.css").read_text())
    return [{name: [int(pair[k][i : i + 2], 16) / 255 for i in (0, 2, 4)] for name, *pair in found} for k in (0, 1)]


def _luminance(colour):
    """Relative luminance, WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _contrast(one, other):
    """(L1 + 0.05) / (L2 + 0.05), WCAG 2.2."""
    low, high = sorted([_luminance(one), _luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_as_the_standard_says():
    assert _contrast([0, 0, 0], [1, 1, 1]) == pytest.approx(21)
    assert _contrast([0x76 / 255] * 3, [1, 1, 1]) == pytest.approx(4.54, abs=0.005)  # the standard's well-known grey


@pytest.mark.parametrize("scheme", [0, 1])
def test_words_and_lines_can_be_told_from_what_they_stand_on(scheme):
    colours = _schemes()[scheme]
    lines = [name for name in colours if name.startswith("line-")]
    assert len(lines) == 7
    for ground in ("page", "panel"):
        for name in ("ink", "soft", "link", *lines[:1]):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in ("edge", *lines):
            assert _contrast(colours[name], colours[ground]) >= 3, (name, ground)


def test_words_have_no_other_colours():
    """So the test above sees them all."""
    rules = (PAGE / "page.css").read_text()
    used = re.findall(r"[^-]color: ([^;]+);", rules) + re.findall(r"text \{ fill: ([^;]+);", rules)
    assert {value for value in used if "scheme" not in value} <= {"var(--ink)", "var(--soft)", "var(--link)", "inherit"}


# -- the command ------------------------------------------------------------------------


def test_the_script_runs_from_anywhere_and_prints_the_path(runs, tmp_path):
    command = [sys.executable, str(ROOT / "analysis" / "report.py"), "--runs", str(runs), "--out", "deep/a.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "deep/a.html\n", "")
    assert (tmp_path / "deep" / "a.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runs", "absent"], "absent"),
        (["--runs", "empty"], "found none"),
        (["--experiment", "demmo"], "nearest: demo"),
        (["--out", "."], "it is a folder"),
        (["--out", "file/report.html"], "expected --out to be a file to write to"),
        (["--out", "/proc/report.html"], "expected --out to be a file to write to"),
        (["--ot", "x"], "nearest: --out"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(runs, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(runs.parent)
    Path("file").touch()
    Path("empty").mkdir(exist_ok=True)
    assert report.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
