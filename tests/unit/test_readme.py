"""The README's commands, config keys and files exist."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from rayhf.config.load import load_config
from rayhf.planning.preflight import check_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0] for line in re.findall(r"^(?:.* -- )?(rayhf .*)$", README, re.M)]


def test_readme_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_and_configs_are_valid(command):
    _, verb, *words = shlex.split(command)
    assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0
    if verb in ("run", "check"):
        path, *overrides = [word for word in words if not word.startswith("--")]
        check_settings(load_config(ROOT / path, overrides))


def test_files_in_the_readme_exist():
    for name in re.findall(
        r"`((?:rayhf|actors|launch|configs|tests|requirements)/[\w/.]*)`", README
    ):
        assert (ROOT / name).exists(), name


def test_exit_codes_are_those_of_the_errors():
    from rayhf import errors

    codes = {
        e.exit_code
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.RayhfError)
    }
    table = {
        int(code)
        for row in re.findall(r"^\| ([\d /]+) \|", README, re.M)
        for code in row.split("/")
    }
    assert codes - {1} == table - {0}
