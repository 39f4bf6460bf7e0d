"""README.md and docs/: commands, configs, code, files, metrics and links that exist."""

import ast
import asyncio
import importlib
import json
import re
import shlex
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from fakes import FakeRollout, make_prompts

import rayhf
from launch.cli import app
from launch.listing import KINDS
from launch.new_project import write_project
from launch.rank import RankConfig
from rayhf import errors
from rayhf.config.evaluate import EvalConfig
from rayhf.config.fit import FitConfig
from rayhf.config.guards import GuardsConfig
from rayhf.config.load import load_config, load_section
from rayhf.config.registry import ALGORITHMS
from rayhf.config.serve import ServeScorerConfig
from rayhf.monitoring.catalog import find
from rayhf.planning.preflight import check_settings
from rayhf.tiny import TASKS
from rayhf.types import Sampling
from tests.docs import DOCS, ROOT, generated
from tests.docs_results import RESULTS

PATHS = {"README.md": ROOT / "README.md"} | {
    path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))
}
TEXT = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = {name: BLOCK.sub("", text) for name, text in TEXT.items()}
COMMANDS = typer.main.get_command(app).commands
METRIC = re.compile(
    r"`((?:policy|rollout|sync|scorer|reference|learner|critic|pairs|eval|time|staleness|selection"
    r"|ppo|dpo|sppo|inpo|mnpo|nash_md|xpo|dno|hypo|sft|kto|mcts|tpo|spar|value|game|tasks"
    r"|self_rewarding)/[\w/<>]+)`"
)
BASE = yaml.safe_load((ROOT / "configs/tiny/online_dpo_arithmetic.yaml").read_text())
"""The campaign that a part of a config is tried with."""


def blocks(language):
    """All code blocks of a language."""
    return [
        match[2] for text in TEXT.values() for match in BLOCK.finditer(text) if match[1] == language
    ]


def command_lines():
    """Every `rayhf ...` line of a code block, without redirection."""
    for name, text in TEXT.items():
        scripts = "".join(match[2] for match in BLOCK.finditer(text) if match[1] == "sh")
        for line in scripts.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "rayhf" in words:
                words = words[words.index("rayhf") + 1 :]
                words = words[: words.index(">")] if ">" in words else words
                yield pytest.param(words, id=f"{name}: rayhf {' '.join(words)}")


def module_blocks():
    """Code blocks that begin with the name of their file, as (file, text)."""
    named = ((re.match(r"# (\w+\.py)\n", text), text) for text in blocks("python"))
    return [(match[1], text) for match, text in named if match]


def shown_config(file):
    """The config of a YAML block that begins with the name of its file; None without one."""
    text = next((text for text in blocks("yaml") if text.startswith(f"# {file}\n")), None)
    return None if text is None else yaml.safe_load(text)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The modules that the pages show, importable."""
    for file, text in module_blocks():
        (tmp_path / file).write_text(text)
        monkeypatch.delitem(importlib.sys.modules, file.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests/outside/src")
    return tmp_path


@pytest.mark.parametrize("name", TEXT)
def test_lines_are_at_most_120_characters(name):
    lines = [line for line in TEXT[name].splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def test_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 150


def test_generated_pages_are_up_to_date():
    for page, text in generated().items():
        assert page.read_text(encoding="utf-8") == text, "python -m tests.docs"


@pytest.mark.parametrize("words", command_lines())
def test_commands_exist_and_configs_are_valid(tmp_path, words):
    verb, *arguments = words
    if verb.startswith("-"):
        assert verb in {option for p in typer.main.get_command(app).params for option in p.opts}
        return
    given = COMMANDS[verb].make_context(verb, arguments).params
    if verb == "list":
        assert given["kind"] in KINDS
    if verb == "init":
        assert given["algorithm"] in ALGORITHMS.builtin
    if verb == "tiny":
        assert set(given["task"] or ()) <= set(TASKS)
    root = {"fit-scorer": FitConfig, "serve-scorer": ServeScorerConfig}.get(verb)
    if root is not None:
        load_section(ROOT / given["config"], given["overrides"] or (), root)
    elif "config" in given:
        shown = shown_config(given["config"].name)
        source = ROOT / given["config"] if shown is None else BASE | shown
        if given["config"] == Path("config.yaml"):  # what `rayhf init` writes
            write_project(tmp_path, "online_dpo", "org/model", "cpu")
            source = tmp_path / "config.yaml"
        check_settings(load_config(source, given["overrides"] or ()))


def test_readme_has_commands():
    assert len(list(command_lines())) > 30


@pytest.mark.parametrize("name", TEXT)
def test_commands_in_prose_exist(name):
    for command in re.findall(r"`rayhf ([^`]+)`", PROSE[name]):
        words = [word for word in command.split() if word != "..."]
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        if words[0].startswith("--"):  # an option of rayhf itself
            parameters = typer.main.get_command(app).params
        else:
            parameters = COMMANDS[words[0]].params
        known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
        assert set(options) <= known, command


def test_presets_of_the_table_exist():
    rows = re.findall(r"^\| (`\w+_\w+`(?:, `\w+`)?) \|", TEXT["loops/index.md"], re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    loops = {
        path.stem
        for path in (ROOT / "configs/tiny").glob("*.yaml")
        if not path.stem.startswith(("fit_", "serve_"))
    }
    assert names == loops


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs_are_valid(modules, text):
    data = yaml.safe_load(text)
    if text.startswith("# rayhf serve-scorer"):
        load_section(data, (), ServeScorerConfig)
    elif text.startswith("# rayhf eval"):
        load_section({"policy": {"model": "m"}, **data}, (), EvalConfig)
    elif text.startswith("# rayhf rank"):
        load_section(data, (), RankConfig)
    else:
        check_settings(load_config(BASE | data))


def test_rows_are_json():
    rows = [json.loads(line) for text in blocks("json") for line in text.splitlines()]
    assert rows and all("prompt" in row or "messages" in row for row in rows)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_uses_names_that_exist(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "rayhf":
            assert node.attr in rayhf.__all__


def test_example_of_a_source(modules):
    with sqlite3.connect(modules / "questions.db") as database:
        database.execute("CREATE TABLE questions (id INTEGER, question TEXT, answer TEXT)")
        database.execute("INSERT INTO questions VALUES (1, '1 + 1 = ?', '2')")
    source_class = importlib.import_module("my_sources").Questions
    source = source_class(source_class.Config(path="questions.db"), base=modules)
    assert list(source.rows()) == [{"prompt": "1 + 1 = ?", "answer": "2"}]


def test_example_of_an_evaluation(modules):
    evaluation_class = importlib.import_module("my_evaluations").GreedyLength
    setup = SimpleNamespace(task="brevity", heldout=tuple(make_prompts(4)))
    evaluation = evaluation_class(evaluation_class.Config(prompts=2), setup)
    context = SimpleNamespace(
        roles=SimpleNamespace(rollouts={"policy": FakeRollout()}),
        versions={"policy": 0},
        sampling=replace(Sampling(max_tokens=8), temperature=0.7),
        seed=0,
        record=lambda values: recorded.append(values.metric),
    )
    recorded = []
    assert asyncio.run(evaluation.measure(context)) == {"brevity/greedy_length": 3.0}
    assert recorded == ["brevity/greedy_length"]


@pytest.mark.parametrize("name", TEXT)
def test_files_that_are_named_exist(name):
    paths = r"(?<![\w/.<])(?:rayhf|actors|launch|configs|tests|requirements|docs)/[\w/.-]*"
    for path in re.findall(paths, TEXT[name]):
        assert (ROOT / path.rstrip(".")).exists() or "NAME" in path, path


@pytest.mark.parametrize("name", TEXT)
def test_metrics_that_are_named_exist(name):
    assert {metric for metric in METRIC.findall(TEXT[name]) if find(metric) is None} == set()


def anchors(text):
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    names = {path: name for name, path in PATHS.items()}
    shown = TEXT | {"results.md": RESULTS.read_text(encoding="utf-8")}  # appended to that page
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub("`[^`]*`", "", PROSE[name])):
        file, _, anchor = target.partition("#")
        path = (PATHS[name].parent / file).resolve() if file else PATHS[name]
        assert path.exists(), target
        assert not anchor or anchor in anchors(shown[names[path]]), target


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                for value in entry.values():
                    yield from pages(value if isinstance(value, list) else [value])

    navigation = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(navigation) == sorted(set(TEXT) - {"README.md"})


def test_exit_codes_are_those_of_the_errors():
    codes = {
        e.exit_code
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.RayhfError)
    }
    table = {
        int(code)
        for code in re.findall(r"^\| (\d+) \|", TEXT["reference/exit_codes.md"], re.MULTILINE)
    }
    assert codes == table - {0}


def test_table_of_guards_has_their_thresholds():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| ([\d.]+|off) \| ([\d.]+|off) \|$", TEXT["operating.md"], re.MULTILINE
    )
    guards = GuardsConfig()
    assert [name for name, *_ in rows] == list(GuardsConfig.model_fields)
    for name, warn, pause in rows:
        guard = getattr(guards, name)
        limits = tuple(None if value == "off" else float(value) for value in (warn, pause))
        assert limits == (guard.warn, guard.pause), name
