"""The documentation's site and pictures, the head of every config, the Dockerfiles."""

import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.curve import keep
from tests.docs import DOCS, ROOT
from tests.docs_results import cells, kept_curve, table, with_results

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
PICTURES = sorted((DOCS / "img").glob("*.svg"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


class Requests(HTMLParser):
    """Addresses that a page loads when it is opened; links to follow do not count."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.addresses.append(given.get("href") or "")


def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    done = subprocess.run(
        [BIN / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [a for a in parser.addresses if re.match(r"(\w+:)?//", a)] == [], page.name
    assert "kill -9 while committing" in (tmp_path / "results.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_picture_is_legible_in_light_and_dark(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.find("{*}title").text
    light, _, dark = text.partition("prefers-color-scheme: dark")
    for rule in (".card", "text"):  # a background of its own, and letters that stand out from it
        assert f"{rule} {{ fill:" in light and f"{rule} {{ fill:" in dark


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_shows(path):
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
    shows = head.partition("# Shows: ")[2].replace("\n# ", " ")
    assert re.search(r"measured \d{4}-\d\d-\d\d\.|not yet run\.", shows), head
    assert ("recipes" in path.parts) == ("8 x 80 GB GPUs" in shows)


def test_figures_of_a_page_are_those_of_the_results():
    page = "<!-- results: The actor | SPaR -->\nold\n<!-- end -->".replace(
        "The actor", "SPaR: the actor's"
    )
    row = next(row for row in table("SPaR: the actor's") if cells(row)[0] == "SPaR")
    assert row in with_results(page) and "old" not in with_results(page)
    with pytest.raises(ValueError, match="no row"):
        with_results(page.replace("| SPaR -->", "| nobody -->"))


def test_curve_of_a_run_is_kept_and_drawn(tmp_path):
    lines = [
        {"iteration": 0, "eval/toy/sampled": 0.25, "eval/toy/length": 9.0},
        {"iteration": 1, "scorer/reward_mean": 0.5, "time/iteration_s": 1.0},
        {"iteration": 2, "scorer/reward_mean": 0.75, "eval/toy/sampled": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "toy.csv"
    assert keep(tmp_path, (), file) == ["eval/toy/sampled", "scorer/reward_mean"]
    assert file.read_text().splitlines()[1:] == ["0,0.25,", "1,,0.5", "2,0.5,0.75"]
    picture = ElementTree.fromstring(kept_curve(file))
    drawn = [line.get("points").split() for line in picture.findall(".//{*}polyline")]
    assert [len(points) for points in drawn] == [2, 2]
    with pytest.raises(SystemExit, match="no metric eval/toy/greedy"):
        keep(tmp_path, ["eval/toy/greedy"], file)


def test_every_loop_has_a_curve_or_says_that_it_has_none():
    for page in (DOCS / "loops").glob("*.md"):
        if page.stem in ("index", "policy_gradient"):  # of several loops
            continue
        text = page.read_text(encoding="utf-8")
        assert "../img/curve_" in text or "No curve yet" in text, page.name


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile(path):
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^FROM \S+:[\d.]+-\S+$", text, re.MULTILINE)  # pinned, not "latest"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in re.findall(r"\.\[([\w,-]+)\]", text):
        assert set(group.split(",")) <= set(extras["optional-dependencies"])


def test_both_dockerfiles_are_there():
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]
