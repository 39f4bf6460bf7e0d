"""Texts of models, scorers and files cannot send control sequences to a terminal."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from campaigns import make_config, run_campaign
from rich.console import Console

from launch import cli
from launch.operate import label, show_audit, show_status, watch
from launch.sanitize import plain
from launch.summary import summary
from launch.view import LiveView
from rayhf.control.commands import FileControl
from rayhf.control.questions import UncertainCompletion, UncertainPair
from rayhf.errors import CheckpointError, ScorerError
from rayhf.run_dir.progress import Event
from rayhf.run_dir.state import write_state
from rayhf.run_dir.store import RunDir

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\x1b[31mred \x9b31m c1 \r\nfake line\x08\x7f \x00 "
    "\u202eright to left \ud800 [bold]markup[/bold] [/]"
)
STEERING = {chr(code) for code in [*range(0x20), *range(0x7F, 0xA0), 0x202E, 0xD800]} - {"\n", "\t"}


def screen():
    return Console(file=io.StringIO(), width=300, force_terminal=False)


def shown(console):
    return console.file.getvalue()


def test_control_characters_are_escaped():
    assert plain("a\x1b[31m\rb\x9b\u202e\ud800") == "a\\x1b[31m\\rb\\x9b\\u202e\\ud800"
    assert plain("Grüße, 漢字 😀\n\ttab") == "Grüße, 漢字 😀\n\ttab"
    assert not STEERING & set(plain(HOSTILE))


def test_events_in_the_live_view():
    console = screen()
    with LiveView(console, iterations=3, task="toy") as view:
        view.phase(1, HOSTILE)
        view.event("fault", f"the scorer said {HOSTILE}")
    assert not STEERING & set(shown(console)) and "[bold]markup[/bold] [/]" in shown(console)


@pytest.fixture
def hostile_run(tmp_path):
    """A run directory in which every text has control sequences."""
    config = make_config(tmp_path)
    run_campaign(config)
    store = RunDir(config)
    store.event("fault", HOSTILE)
    reason = HOSTILE.replace("\ud800", "")
    paused = {"state": "paused", "reason": reason, "guards": ("kl",)}
    write_state(store.path, store.state.model_copy(update=paused))
    store.close()
    (config.run.dir / ".lock").write_text(
        f"host elsewhere {HOSTILE.encode('ascii', 'replace').decode()}"
    )
    (config.run.dir / "samples/iteration-000002.parquet").unlink()
    metrics = config.run.dir / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text() + json.dumps({"iteration": 4, f"{HOSTILE[:20]}/version": 1.0}) + "\n"
    )
    return config.run.dir


def test_status_and_verify(hostile_run):
    console = screen()
    show_status(FileControl(hostile_run), console)
    with pytest.raises(CheckpointError):
        show_audit(hostile_run, console, deep=False)
    assert not STEERING & set(shown(console))
    assert "[bold]markup[/bold]" in shown(console) and "\\x1b[2J" in shown(console)


class Campaign(FileControl):
    """A campaign with a hostile event, a hostile pair and a hostile completion."""

    takes_thumbs = False

    def status(self):
        return SimpleNamespace(takes_thumbs=self.takes_thumbs)

    def watch(self, is_active):
        yield Event(time="2026-11-21T12:00:00", epoch=1, kind="fault", message=HOSTILE)

    def uncertain_pairs(self, count):
        messages = ({"role": HOSTILE, "content": HOSTILE},)
        return [
            UncertainPair(
                pair_id="1/p/0/1", messages=messages, first=HOSTILE, second=HOSTILE, certainty=0.0
            )
        ]

    def uncertain_completions(self, count):
        messages = ({"role": HOSTILE, "content": HOSTILE},)
        return [
            UncertainCompletion(
                completion_id="1/p/0", messages=messages, completion=HOSTILE, certainty=0.0
            )
        ]


@pytest.mark.parametrize(("takes_thumbs", "texts"), [(False, 5), (True, 4)])
def test_watching_and_judging(tmp_path, monkeypatch, takes_thumbs, texts):
    console, control = screen(), Campaign(tmp_path)
    control.takes_thumbs = takes_thumbs
    watch(control, console)
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    label(control, console, file=None, count=1)
    assert not STEERING & set(shown(console)) and shown(console).count("\\x1b[2J") >= texts


def test_directorys_name_in_the_summary(tmp_path):
    config = make_config(tmp_path)
    run_campaign(config)
    hostile = config.run.dir.rename(tmp_path / "\x1b[2J[bold]run[bold]")
    console = screen()
    console.print(summary(hostile, "toy"))
    assert "\x1b" not in shown(console) and "[bold]run[bold]" in shown(console)


def test_error_line(monkeypatch, capsys):
    for error, code in ((ScorerError(f"a rule said {HOSTILE}"), 9), (ValueError(HOSTILE), 1)):

        def fail(error=error):
            raise error

        monkeypatch.setattr(cli, "app", fail)
        monkeypatch.delenv("RAYHF_DEBUG", raising=False)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        line = capsys.readouterr().err
        assert stop.value.code == code and not STEERING & set(line) and line.count("\n") == 1


def test_plain_imports_nothing_heavy():
    code = (
        "import sys, launch.sanitize, launch.cluster_auth; "
        "print({'ray', 'rich', 'torch', 'pydantic'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
