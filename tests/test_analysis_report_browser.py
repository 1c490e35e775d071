"""The report in a real browser: what it does when it is clicked, typed at, narrowed, darkened and printed."""

import json
import shutil

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from analysis import report
from tests.run_folders import ATTEMPT, configuration, curve, write_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium or no chromedriver here (apt-get install chromium chromium-driver)"
)
HOSTILE = "<img src=x onerror='window.stolen = 1'></script><script>window.stolen = 1</script>\u2028"
EPOCHS = 60  # 600 train points, so they are thinned
RUNS = "section-3-table-1"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Where the page of a few runs lies."""
    root = tmp_path_factory.mktemp("browser")
    runs = root / ("runs_" * 12)  # no place to break a line at
    for method in ("vanilla", "tract"):
        for seed in (0, 1, 10):
            config = configuration(seed, method, EPOCHS)
            write_run(runs, config, curve(seed, method, EPOCHS, 9 if method == "tract" else 40))
    failure = {"kind": HOSTILE, "reason": HOSTILE, "traceback": [HOSTILE]}
    attempt = ATTEMPT | {"command": HOSTILE}
    config = configuration(2, {"name": "tract", "note": HOSTILE}, EPOCHS)
    config["method"]["name"] = "tract"
    write_run(runs, config, [70.0], finished=False, failure=failure, attempts=(attempt,))
    assert report.main(["--runs", str(runs), "--out", str(root / "report.html")]) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page):
    """The page freshly opened, in light, on a desktop, scrolled at once; nothing may be complained about."""
    _media(chromium)
    _size(chromium, 1280, 900)
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    chromium.get(page.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.stolen") is None


def _media(driver, media="", scheme="light", motion="reduce"):
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    listed = [{"name": name, "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": listed})


def _size(driver, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _all(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def _style(driver, selector, name):
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return driver.execute_script(script, selector, name)


def _rows(driver, table=RUNS):
    """[[text of each cell]] of the rows that are not hidden."""
    script = """return [...document.getElementById(arguments[0]).tBodies[0].rows].filter(row => !row.hidden)
        .map(row => [...row.cells].map(cell => cell.innerText.trim()))"""
    return driver.execute_script(script, table)


def _header(driver, name, table=RUNS):
    (button,) = [button for button in _all(driver, f"#{table} .sort") if button.text == name]
    return button


def _button(driver, words):
    return next(button for button in _all(driver, ".open") if words in button.text)


def _wait(driver, condition):
    WebDriverWait(driver, 20).until(lambda _: condition())


def _open(driver, words):
    """Open a run by the keyboard and wait for its curves."""
    before = len(_all(driver, ".run"))
    _button(driver, words).send_keys(Keys.ENTER)
    _wait(driver, lambda: len(_all(driver, ".run")) == before + 1)


def test_it_asks_nothing_of_any_network(browser, page):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert {call["request"]["url"] for call in asked} - {"data:,"} == {page.as_uri()}
    _open(browser, "vanilla-s0")
    assert not any("Network.requestWillBeSent" in entry["message"] for entry in browser.get_log("performance"))
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def test_the_policy_refuses_whatever_is_not_the_pages_own(chromium, page):
    chromium.get(page.as_uri())
    refused = chromium.execute_async_script("""
        const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.stolen = 1"}));
        document.body.setAttribute("style", "color: red");
        document.body.append(Object.assign(new Image(), {src: "https://example.invalid/x.png"}));
        fetch("https://example.invalid/").catch(() => setTimeout(() => done(refused), 50));""")
    assert set(refused) == {"script-src-elem", "style-src-attr", "img-src", "connect-src"}
    assert chromium.execute_script("return window.stolen") is None
    chromium.get_log("browser")  # here complaints are the point


def test_a_click_sorts_by_the_numbers_and_another_one_turns_them_round(browser):
    header = _header(browser, "Final value")
    for order, turned in (("ascending", False), ("descending", True)):
        header.click()
        assert browser.execute_script("return arguments[0].closest('th').ariaSort", header) == order
        shown = [row[5] for row in _rows(browser)]
        truth = [curve(s, m, EPOCHS, 9 if m == "tract" else 40)[-1] for m in ("vanilla", "tract") for s in (0, 1, 10)]
        assert shown == [f"{value:.2f}" for value in sorted(truth, reverse=turned)] + ["–"]
    assert min(truth) < 70 < 90 < max(truth)


def test_the_keyboard_sorts_too_and_ties_keep_their_order(browser):
    _header(browser, "Seed").send_keys(Keys.SPACE)
    assert [row[4] for row in _rows(browser)] == ["0", "0", "1", "1", "2", "10", "10"]
    _header(browser, "State").send_keys(Keys.ENTER)
    assert [(row[2], row[4]) for row in _rows(browser)][:2] == [("failed", "2"), ("finished", "0")]
    assert [row[4] for row in _rows(browser)] == ["2", "0", "0", "1", "1", "10", "10"]
    assert len(_all(browser, f"#{RUNS} [aria-sort]")) == 1
    _header(browser, "Method").send_keys(Keys.ENTER)
    _header(browser, "Method").send_keys(Keys.ENTER)
    shown = [(row[3], row[4]) for row in _rows(browser)]
    assert [seed for method, seed in shown if method == "vanilla"] == ["0", "1", "10"]
    assert shown[0][0] == "vanilla"


def test_the_filter_leaves_the_rows_with_all_of_its_words(browser):
    (field,) = _all(browser, "input[type=search]")
    field.send_keys("  VANILLA finished")
    assert [row[3:5] for row in _rows(browser)] == [["vanilla", seed] for seed in ("0", "1", "10")]
    assert browser.find_element(By.TAG_NAME, "output").text == "3 of 7"
    field.send_keys(" nowhere")
    assert _rows(browser) == []
    field.clear()
    field.send_keys("a", Keys.BACKSPACE)
    assert len(_rows(browser)) == 7


def _drawn(driver, tag, line=0):
    """A line's points in the units of its axes, by its ticks."""
    script = """
        const chart = [...document.querySelectorAll(".chart")].find(chart => chart.dataset.tag === arguments[0]);
        const ticks = (anchor, at) => [...chart.querySelectorAll(`text[text-anchor=${anchor}]`)]
            .map(text => [text.getAttribute(at), text.textContent.replace(/,/g, "")].map(Number))
            .filter(tick => !Number.isNaN(tick[1]));
        const line = chart.querySelectorAll("[role=img] .line")[arguments[1]];
        return [line.getAttribute("d"), ticks("middle", "x"), ticks("end", "y")];
    """
    path, *axes = driver.execute_script(script, tag, line)
    points = np.array([[float(number) for number in pair.split()] for pair in path[1:].split("L")])
    points[:, 1] += 4  # a tick's words stand 4 below it
    for axis, ticks in enumerate(axes):
        (a, va), (b, vb) = ticks[0], ticks[-1]
        points[:, axis] = va + (points[:, axis] - a) / (b - a) * (vb - va)
    return points


def test_a_run_opened_by_keyboard_shows_its_curves(browser):
    assert len(_all(browser, ".open[aria-expanded=false]")) == 7
    _open(browser, "vanilla-s1-")
    assert _button(browser, "vanilla-s1-").get_attribute("aria-expanded") == "true"
    truth = curve(1, "vanilla", EPOCHS, 40)
    points = _drawn(browser, "test/top1")
    assert points[:, 0] == pytest.approx(np.arange(1, EPOCHS + 1), abs=0.01)
    assert points[:, 1] == pytest.approx(truth, abs=0.01)
    loss = _drawn(browser, "train/loss")
    assert len(loss) <= 500
    assert loss[[0, -1]] == pytest.approx(np.array([[0, 1], [599, 1 / 600]]), abs=0.01)
    text = browser.find_element(By.ID, "charts").text
    assert f"{len(loss)} of 600 points drawn" in text
    assert f"last {np.float32(truth[-1]):.6g} at epoch {EPOCHS}" in text
    words = browser.find_element(By.CSS_SELECTOR, "[data-tag='test/top1'] svg").get_attribute("aria-label")
    assert f"from {np.float32(truth[0]):.6g} at epoch 1 to {np.float32(truth[-1]):.6g} at epoch 60" in words


def test_ticks_are_round_and_within(browser):
    for low, high in ((0, 1), (1, 2), (-3.7, 18.9), (0.0123, 0.0124), (0, 99_999), (69.7, 95.4)):
        for least in (0, 1):
            ticks = np.array(browser.execute_script("return ticksOf(...arguments)", low, high, least))
            assert low <= min(ticks, default=low) <= max(ticks, default=high) <= high
            assert least or 3 <= len(ticks) <= 6
            steps = np.diff(ticks)
            assert steps == pytest.approx(np.full_like(steps, steps[0] if len(steps) else 0))
            assert all(f"{step:.1e}"[:3] in ("1.0", "2.0", "5.0") and step >= least * (1 - 1e-9) for step in steps)


def test_runs_are_laid_over_each_other_and_told_apart_without_colour(browser):
    _open(browser, "vanilla-s0")
    _open(browser, "tract-s0")
    lines = _all(browser, "[data-tag='test/top1'] [role=img] .line")
    dashes = {line.value_of_css_property("stroke-dasharray") for line in lines}
    assert (len(lines), len(dashes)) == (2, 2)
    assert _drawn(browser, "test/top1", 1)[-1, 1] == pytest.approx(curve(0, "tract", EPOCHS, 9)[-1], abs=0.01)
    _all(browser, ".close")[0].click()
    _wait(browser, lambda: len(_all(browser, ".run")) == 1)
    assert "tract-s0" in browser.find_element(By.CSS_SELECTOR, ".run h4").text
    assert browser.switch_to.active_element == _button(browser, "vanilla-s0")
    _all(browser, "#close-all")[0].click()
    _wait(browser, lambda: not _all(browser, ".run, .chart"))
    assert not _all(browser, ".open[aria-expanded=true]")


def test_a_run_closed_before_it_is_shown_stays_closed(browser):
    shown = browser.execute_async_script("""
        const [button, done, ready] = [document.querySelector(".open"), arguments[0], unpack];
        let release;
        const held = new Promise(resolve => release = resolve);
        window.unpack = number => held.then(() => ready(number));
        button.click();
        button.click();
        setTimeout(() => {
            release();
            ready(0).then(() => setTimeout(() => done(document.querySelectorAll(".run, [aria-expanded=true]").length)));
        });""")
    assert shown == 0


def test_an_opened_run_shows_hostile_words_as_words(browser):
    _open(browser, "-s2-")
    for part in _all(browser, ".run summary"):
        part.send_keys(Keys.ENTER)
    text = browser.execute_script("return document.querySelector('.run').textContent")
    assert text.count(HOSTILE.rstrip("\u2028")) >= 3
    for words in ("Configuration", "depth: 5", "0123456789ab", "torch 2.15.0", "failed", "--resume"):
        assert words in text


def test_a_cells_links_lead_to_its_runs_even_where_they_are_filtered_away(browser):
    _all(browser, "input[type=search]")[0].send_keys("nowhere")
    _all(browser, "#section-1-table-1 summary")[0].send_keys(Keys.ENTER)
    link = _all(browser, "#section-1-table-1 a")[0]
    (number,) = [link.get_attribute("href").partition("#run-")[2]]
    name = browser.find_element(By.CSS_SELECTOR, f".open[data-run='{number}']").get_attribute("textContent")
    link.send_keys(Keys.ENTER)
    _wait(browser, lambda: browser.switch_to.active_element.tag_name == "h4")
    assert browser.switch_to.active_element.text == name
    assert len(_rows(browser)) == 7
    _all(browser, ".close")[0].click()
    _wait(browser, lambda: not _all(browser, ".run"))
    browser.execute_script("arguments[0].focus()", link)
    link.send_keys(Keys.ENTER)  # the same address again
    _wait(browser, lambda: _all(browser, ".run"))


def test_a_telephone_needs_no_sideways_scrolling(browser):
    _open(browser, "vanilla-s0")
    _open(browser, "-s2-")
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    for width in (360, 320):
        _size(browser, width, 740)
        wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert (inner, wide <= inner) == (width, True)
        assert (
            browser.execute_script("""
            return [...document.querySelectorAll("body *")].filter(node => node.scrollWidth > node.clientWidth + 1
                && ["auto", "scroll"].includes(getComputedStyle(node).overflowX) && node.tabIndex < 0).length""")
            == 0
        )


def test_the_tabulator_goes_from_the_skip_link_on_and_is_seen(browser):
    seen = []
    for _ in range(9):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        seen.append(focused.text or focused.tag_name)
        assert focused.value_of_css_property("outline-style") == "solid"
        box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", focused)
        assert 0 <= box["top"] < 900
    assert seen[:2] == ["Skip to the content", "Theme: system"]
    assert seen[2:7] == ["Experiment demo", "Paper: not run yet", "Runs", "Failures and doubts", "Cost"]
    assert "vanilla" in seen[7]  # the table's region, then its first button
    assert seen[8] == "vanilla"


def test_dark_and_light_follow_the_system_and_the_button(browser):
    light = _style(browser, "body", "background-color")
    _media(browser, scheme="dark")
    dark = _style(browser, "body", "background-color")
    assert dark != light
    (button,) = _all(browser, "#theme")
    found = []
    for _ in range(3):
        button.send_keys(Keys.ENTER)
        found.append((button.text, _style(browser, "body", "background-color")))
    assert found == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", dark)]
    _media(browser, scheme="light")
    assert _style(browser, "body", "background-color") == light


def test_print_is_light_and_without_controls_and_says_everything(browser):
    ink = _style(browser, "body", "color")
    _media(browser, scheme="dark")
    _all(browser, "#theme")[0].click()
    _all(browser, "#theme")[0].click()
    assert _style(browser, "body", "color") != ink
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = false")
    _media(browser, media="print", scheme="dark")
    assert _style(browser, "body", "background-color") == "rgb(255, 255, 255)"
    assert _style(browser, "body", "color") == ink
    for selector in ("nav", "#theme", ".filter", ".skip"):
        assert _style(browser, selector, "display") == "none"
    assert _style(browser, ".tall", "max-height") == "none"
    seen = "return document.querySelector(arguments[0]).checkVisibility()"
    assert browser.execute_script(seen, ".group li")
    assert not browser.execute_script(seen, "td details li")
    _media(browser)
    assert not browser.execute_script(seen, ".group li")


def test_nothing_moves_where_motion_is_not_wanted(browser):
    assert _style(browser, "html", "scroll-behavior") == "auto"
    _media(browser, motion="no-preference")
    assert _style(browser, "html", "scroll-behavior") == "smooth"
    assert browser.execute_script("return document.getAnimations().length") == 0
