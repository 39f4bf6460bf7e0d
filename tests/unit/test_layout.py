"""Rules that hold for the whole repository: imports, shipped configs, config keys, test files."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rayhf.config import algorithms, schema, scorers, serve, service
from rayhf.config.base import Section
from rayhf.config.fit import FitConfig
from rayhf.config.load import load_config, load_section
from rayhf.config.registry import REGISTRIES
from rayhf.config.serve import ServeScorerConfig
from rayhf.planning.preflight import check_settings

ROOT = Path(__file__).parents[2]
ROOMS = ("rayhf", "actors", "launch")
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def test_importing_rayhf_needs_no_engine():
    """Who may import what is a contract of import-linter; this is the cost at run time."""
    modules = "rayhf, rayhf.config.load, rayhf.campaign.controller, rayhf.planning.preflight"
    heavy = "{'ray', 'vllm', 'deepspeed', 'wandb', 'grpc'}"
    assert run_python(f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_config_imports_no_torch():
    code = "import sys, rayhf.config.load; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def run_python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    if path.stem.startswith("fit_"):
        load_section(path, (), FitConfig)
    elif path.stem.startswith("serve_scorer_"):
        load_section(path, (), ServeScorerConfig)
    else:
        check_settings(load_config(path))


def test_every_config_key_is_read():
    files = [
        f
        for room in ROOMS
        for f in (ROOT / room).rglob("*.py")
        if ROOT / "rayhf/config" not in f.parents
    ]
    code = "\n".join(f.read_text() for f in files)
    code += "\n".join(
        re.findall(
            r"self\.\w+", "\n".join(f.read_text() for f in (ROOT / "rayhf/config").glob("*.py"))
        )
    )
    modules = [algorithms, schema, scorers, serve, service]
    for registry in REGISTRIES.values():
        modules += [sys.modules[registry.config_type(n).__module__] for n in registry.builtin]
    sections = {
        c
        for module in modules
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Section)
    }
    unread = {
        f"{c.__name__}.{name}"
        for c in sections
        for name in c.model_fields
        if not re.search(rf'[."]{name}\b', code)
    }
    assert unread == set()


def test_names_of_test_files_are_unique():
    """Pytest imports test files by their name alone."""
    names = Counter(
        file.name
        for file in (ROOT / "tests").rglob("*.py")
        if file.name[0] != "_" and file.name != "conftest.py"
    )
    assert [name for name, count in names.items() if count > 1] == []
