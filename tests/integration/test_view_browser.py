"""The pages in headless Chromium: they open, filters work, hostile text stays text."""

import contextlib
import re
import shutil
import socket
import threading
import time

import pytest
import uvicorn
from view_runs import write_run

from rayhf.view.dashboard import build_app
from rayhf.view.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium; requirements/browser.sh installs it"
)
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'><svg onload=window.hacked=1>",
    "<!--<script>\u2028\u2029 window.hacked=1 {{ 7*7 }} ${window.hacked=1}",
    "\u202egnp.txt\x00\x1b]0;title\x07<a href='javascript:window.hacked=1'>click</a>",
    "&lt;b&gt; <plaintext> <style>* { display: none }</style> \"'`",
    "a" * 3000,
)
TABS = ("overview", "samples", "heldout", "pairs", "wins", "judgments", "trees", "timeline")


@pytest.fixture(scope="module")
def browser(runs):  # the runs first: playwright's event loop would refuse theirs
    with sync_api.sync_playwright() as playwright:
        # In a container the browser has no user namespace for its sandbox.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    hostile = write_run(folder / "<b onclick=1>'&quot;", texts=HOSTILE)
    return folder, [hostile, write_run(folder / "second", iterations=3, learner={"lr": 0.5})]


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return write_report(runs[1], tmp_path_factory.mktemp("report") / "report.html").file


@pytest.fixture(scope="module")
def server(runs):
    """URL of a dashboard over the runs."""
    application = build_app(runs[0], token=None, hosts=frozenset({"127.0.0.1"}))
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


class Tab:
    """A page of the browser that notes what went wrong in it and what it loaded."""

    def __init__(self, browser, url, width=1280):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.problems = []
        self.requests = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self._note(m.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("dialog", lambda dialog: self._note(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("body[data-shown]")

    def _note(self, text):
        self.problems.append(text)

    def show(self, address):
        """Go to a page of the application, and wait until it is drawn."""
        before = self.page.get_attribute("body", "data-shown")
        if not self.page.evaluate("address => location.hash === `#${address}`", address):
            self.page.evaluate("address => { location.hash = address }", address)
        else:
            self.page.evaluate("show()")
        self.page.wait_for_function("old => document.body.dataset.shown !== old", arg=before)

    def click(self, selector):
        before = self.page.get_attribute("body", "data-shown")
        self.page.click(selector)
        self.page.wait_for_function("old => document.body.dataset.shown !== old", arg=before)

    def texts(self, selector):
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def check(self):
        """Nothing went wrong, and no text became HTML."""
        assert self.problems == []
        assert self.page.evaluate("window.hacked") is None
        assert self.page.locator("main script, main img, main plaintext, main style").count() == 0

    def leaving(self):
        """Requests that left the file."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture(scope="module")
def report_tab(browser, report):
    tab = Tab(browser, report.as_uri())
    yield tab
    tab.page.close()


@pytest.fixture
def tab(report_tab):
    """The open report, at its overview."""
    report_tab.show("overview")
    report_tab.problems.clear()
    return report_tab


@pytest.mark.parametrize("width", [1280, 800])
def test_every_page_opens_and_no_request_leaves_the_file(browser, report, tmp_path, width):
    tab = Tab(browser, report.as_uri(), width)
    for name in TABS:
        tab.show(name)
        assert tab.page.locator("main h1").count() == 1
        wide = tab.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        assert not wide, f"{name} is wider than the window"
        tab.page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
        tab.check()
    assert tab.leaving() == []
    assert len(list(tmp_path.glob("*.png"))) == len(TABS)
    tab.page.close()


def test_curves_of_both_runs_and_their_differences(tab):
    rows = tab.texts("table:has(th:text-is('key')) >> nth=0 >> tbody tr")
    assert any(row.startswith("learner.lr") and row.endswith("0.5") for row in rows)
    named = tab.texts("[data-chart='Reward'] .legendtext")
    assert len(named) == 4 and named[2:] == ["warning: guard kl", "fault"]
    assert tab.page.locator("[data-chart='phases'] .barlayer").count() == 2
    assert "guard kl: reference/kl is 0.2 <b>nats</b>" in tab.page.inner_text("main")
    tab.check()


def test_buttons_of_a_chart_are_beside_its_curves(tab):
    chart = tab.page.locator("[data-chart='Reward']")
    chart.hover()
    buttons = chart.locator(".modebar").bounding_box()
    curves = chart.locator(".nsewdrag").first.bounding_box()
    assert buttons["x"] >= curves["x"] + curves["width"]
    assert buttons["y"] + buttons["height"] <= curves["y"] + chart.bounding_box()["height"]


def test_message_of_an_alarm_is_shown_on_its_line(tab):
    chart = tab.page.locator("[data-chart='Reward']")
    plot = chart.locator(".nsewdrag").first.bounding_box()
    box = chart.bounding_box()
    left = tab.page.evaluate(
        "document.querySelector(\"[data-chart='Reward']\")._fullLayout.xaxis.d2p(2)"
    )
    chart.hover(position={"x": plot["x"] - box["x"] + left, "y": plot["y"] - box["y"] + 20})
    tab.page.wait_for_selector("[data-chart='Reward'] .hoverlayer .legendtext")
    lines = "".join(tab.texts("[data-chart='Reward'] .hoverlayer .legendtext"))
    shown = lines.replace(" ", "")  # a line break is no space
    assert "second/run:warning:guardkl:reference/klis0.2<b>nats</b>" in shown
    assert "second/run:fault:restartingrolloutengine0:itsprocesswaskilled" in shown
    tab.check()


def test_figures_of_evaluations_say_what_they_mean(tab):
    figures = tab.texts("table:has(th:text-is('figure')) tbody td:nth-child(2)")
    assert "eval/toy/sampledmean score at temperature 1" in figures


def test_filters_work(tab):
    tab.show("samples")
    assert len(tab.texts("main tbody tr")) == 50
    tab.page.select_option("select[name=outcome]", "Failed")
    tab.page.fill("input[name=first]", "2")
    tab.click("main form button")
    rows = tab.texts("main tbody tr")
    assert len(rows) == 3 and all("the judge did not answer" in row for row in rows)
    tab.click("text=clear")
    tab.page.fill("input[name=text]", "number 3")
    tab.click("main form button")
    assert all(
        re.search(r"about Write about \w+, number 3\.", t) for t in tab.texts("main tbody tr")
    )
    tab.click("text=clear")
    tab.page.fill("input[name=text]", "WINDOW.HACKED")
    tab.click("main form button")
    assert all("window.hacked" in row for row in tab.texts("main tbody tr"))
    tab.check()


def test_list_continues_with_the_next_page(tab):
    tab.show("samples")
    tab.page.click("text=more")
    tab.page.wait_for_function("document.querySelectorAll('main tbody tr').length > 50")
    tab.check()


def test_hostile_completions_are_shown_as_text(tab):
    tab.show("samples?text=script")
    tab.click("main tbody tr >> nth=0")
    shown = tab.texts("main .card .text")
    assert HOSTILE[0] in shown and HOSTILE[1] in shown
    tab.page.select_option("select[name=mode]", "logp")
    joined = tab.texts("main .card .tokens")
    assert HOSTILE[0] in joined and tab.page.locator(".tokens span[title]").count() > 100
    tab.check()


def test_words_of_judges_are_shown_as_text(tab):
    tab.show("samples?text=script")
    tab.click("main tbody tr >> nth=0")
    tab.page.click(".reply summary >> nth=0")
    assert f"Seen: {HOSTILE[0]}" in tab.texts("main .reply[open] .text")
    tab.check()
    tab.show("judgments?last=4")
    listed = tab.texts("main .reply[open] .text")
    assert {f"Seen: {HOSTILE[0]}", f"Seen: {HOSTILE[1]}", "0 before 1"} <= set(listed)
    assert "judge: #2 first, #0 second does not count" in tab.texts("main .reply summary")
    tab.check()
    tab.show("heldout")
    assert "reasoning: <b>good</b>\n\nverdict: yes" in tab.texts("main .reply .text")
    tab.check()


def test_policy_blocks_scripts_and_requests_that_would_be_smuggled_in(tab):
    tab.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        " document.body.append(s); }"
    )
    assert tab.page.evaluate("window.hacked") is None
    refused = tab.page.evaluate(
        "fetch('http://127.0.0.1:9/').then(() => false, error => error instanceof TypeError)"
    )
    assert refused and any("Content Security Policy" in text for text in tab.problems)


def test_tokens_are_colored_by_what_training_added(tab):
    tab.show("group?iteration=4&prompt=prompt-4-3")
    assert re.match(r"reference answerabout Write .* number 3\.", tab.texts("main .message")[-1])
    assert tab.texts("select[name=mode] option") == [
        "no colors",
        "log-prob",
        "gap: log-prob − reference",
        "advantage",
    ]
    tab.page.select_option("select[name=mode]", "advantage")
    title = tab.page.get_attribute(".tokens span >> nth=1", "title")
    assert "advantage 0.9" in title
    tab.check()


def test_pairs_show_the_words_that_differ(tab):
    tab.show("pairs")
    assert tab.page.locator("ins").count() and tab.page.locator("del").count()
    assert "judge: #0 first, #1 second" in tab.texts("main .pair .reply summary")
    assert tab.texts(".score")[0] == "margin 1"
    tab.check()


def test_win_matrix_marks_the_cycle(tab):
    tab.show("wins")
    tab.click("main tbody tr >> nth=0")
    assert tab.texts("td.cycle") == ["0.90", "0.80", "0.80"]
    assert "#0 beats #1 beats #2 beats #0" in tab.page.inner_text("main")
    tab.check()


def test_tree_shows_the_chosen_path_and_pairs(tab):
    tab.show("trees")
    tab.click("main tbody tr >> nth=0")
    assert len(tab.texts(".tree .path")) == 2
    assert tab.page.locator(".tree details[open]").count() == 1
    assert "pair 1: chosen" in tab.page.inner_text(".tree")
    assert tab.page.inner_text(".tree").count("visits") == 4
    tab.page.click("text=close all")
    assert tab.page.locator(".tree details[open]").count() == 0
    tab.check()


def test_held_out_prompt_over_the_iterations(tab):
    tab.show("heldout")
    assert len(tab.texts("main tbody tr")) == 5
    option = tab.page.locator("select[name=prompt] option").nth(1).get_attribute("value")
    tab.page.select_option("select[name=prompt]", option)
    tab.page.wait_for_function("id => location.hash.includes(id)", arg=option)
    tab.check()


def test_timeline_filters_events(tab):
    tab.show("timeline")
    tab.page.select_option("select[name=kind]", "fault")
    rows = tab.texts("h2:text-is('Events') ~ div tbody tr")
    assert len(rows) == 1 and "rollout engine 0" in rows[0]
    tab.check()


def test_dashboard_shows_the_same_pages_live(browser, server, runs):
    tab = Tab(browser, server)
    for name in TABS:
        tab.show(name)
        tab.check()
    tab.page.click("#runs summary")
    boxes = tab.page.locator("#runs label")
    assert boxes.count() == 2
    tab.show("samples?run=second/run&outcome=Failed")
    assert len(tab.texts("main tbody tr")) == 3
    tab.click("main tbody tr >> nth=0")
    assert "the judge did not answer" in tab.page.inner_text("main")
    tab.show("timeline?run=second/run")
    tab.show("overview?run=second/run")
    before = tab.page.get_attribute("body", "data-shown")
    with (runs[1][1] / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "scorer/reward_mean": 0.9}\n')
    tab.page.wait_for_function(
        "old => document.body.dataset.shown !== old", arg=before, timeout=20_000
    )
    tab.check()
    assert all(url.startswith((server, "data:")) for url in tab.requests)
    tab.page.close()
