"""The source neither unpickles nor evaluates anything, starts no shell, trusts no model code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for room in ("rayhf", "actors", "launch") for file in (ROOT / room).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
EVALUATES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "parse_expr",
    "sympify",
}
UNSAFE_YAML = {
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
}


def name_of(node: ast.expr) -> str:
    """a.b.c of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def problems(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (
                f"imports {module}" for module in modules if module.split(".")[0] in PICKLES
            )
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        spread = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
        if name in EVALUATES or name in UNSAFE_YAML:
            yield f"calls {name}"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if keywords.get("shell", "False") != "False":
            yield f"{name} with a shell"
        if keywords.get("trust_remote_code", "False") != "False":
            yield f"{name} trusts a model's code"
        as_data = {"AS_DATA", "WEIGHTS_AS_DATA"} & set(spread)
        if name.endswith(".from_pretrained") and not as_data:
            yield f"{name} without AS_DATA"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_untrusted_code_is_executed(file: Path) -> None:
    assert list(problems(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "yaml.load(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(path)",
        "LLM(path, trust_remote_code=True)",
    ],
)
def test_lint_rules_find_unsafe_code(bad: str) -> None:
    assert list(problems(bad))
