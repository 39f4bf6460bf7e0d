"""Rules of the house: who may import whom, what importing costs, and that every shipped config
parses."""

import ast
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
ALLOWED = {
    "rayhf": {"rayhf"},
    "actors": {"rayhf", "actors"},
    "launch": {"rayhf", "actors", "launch"},
}
HEAVY = {
    "vllm": {"rayhf/rollout"},
    "deepspeed": {"rayhf/learner", "rayhf/weights"},
    "wandb": {"rayhf/monitoring/wandb.py"},
    "grpc": {"rayhf/service", "rayhf/scorer/grpc", "rayhf/control"},
}
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_one_way(room):
    for file in (ROOT / room).rglob("*.py"):
        for name in imports(file):
            place = str(file.relative_to(ROOT))
            assert name not in ALLOWED or name in ALLOWED[room], f"{place} imports {name}"
            assert room != "rayhf" or name != "ray", f"{place} imports ray"
            if name in HEAVY:
                assert any(place.startswith(home) for home in HEAVY[name]), (
                    f"{place} imports {name}"
                )


def test_importing_rayhf_needs_no_engine():
    code = (
        "import sys, rayhf, rayhf.config.load, rayhf.campaign.controller, rayhf.planning.preflight\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'wandb', 'grpc'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_config_imports_no_torch():
    code = "import sys, rayhf.config.load; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    if path.stem.startswith("fit_"):
        load_section(path, (), FitConfig)
    elif path.stem.startswith("serve_scorer_"):
        load_section(path, (), ServeScorerConfig)
    else:
        check_settings(load_config(path))


def test_every_config_key_is_read_somewhere():
    """A key that does nothing is a promise that is not kept."""
    files = [
        f
        for room in ALLOWED
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


def test_every_file_of_tests_has_a_name_of_its_own():
    """pytest imports them by their names alone: two of one name stop the whole run."""
    names = Counter(
        file.name
        for file in (ROOT / "tests").rglob("*.py")
        if file.name[0] != "_" and file.name != "conftest.py"
    )
    assert [name for name, count in names.items() if count > 1] == []
