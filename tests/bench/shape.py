"""Figures of the code's shape, for two states of it side by side.

    python -m tests.bench.shape [REVISION] [--record]

Measures the packages rayhf, actors and launch (generated gRPC modules left out) in the working tree
and in REVISION of git, and lists the lines of code of each loop. `--record` writes the tables into
RESULTS.md.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from rayhf.config.base import PluginConfig
from rayhf.config.registry import ALGORITHMS, REGISTRIES, Registry
from tests.bench.results import put_section

ROOT = Path(__file__).parents[2]
PACKAGES = ("rayhf", "actors", "launch")
BEFORE = "a5f3216"
"""The last revision before the packages were reorganized."""
LOOP_PACKAGES = ("rayhf.algorithms.", "rayhf.losses.", "rayhf.search.")
"""Where the parts of loops are."""
LINE_LENGTH = 100
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Example:
    """A plugin of one kind, found in the code by its name."""

    name: str
    own: tuple[str, ...] = ()
    """Files that hold nothing else."""


EXAMPLES = {
    "loss": Example("ipo"),
    "algorithm": Example("inpo", own=("rayhf/algorithms/inpo.py", "rayhf/losses/selfplay.py")),
    "scorer": Example("pairwise_rule", own=("rayhf/scorer/rule.py",)),
    "tracker": Example("wandb", own=("launch/tracking.py", "rayhf/monitoring/wandb.py")),
}


@dataclass(frozen=True)
class Module:
    """One Python file, parsed."""

    path: str
    """Relative to the repository's root."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def code(self) -> list[tokenize.TokenInfo]:
        """Tokens without layout, comments and docstrings."""
        docstrings = {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if isinstance(node.value.value, str)
        }
        return [
            token
            for token in self.tokens
            if token.type not in LAYOUT | {tokenize.COMMENT} and token.start[0] not in docstrings
        ]

    def functions(self) -> Iterator[int]:
        """Lines of every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1

    def imports(self) -> Iterator[str]:
        """Full names of imported modules, and of what is imported from them."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_tree(root: Path) -> list[Module]:
    return [
        Module(str(file.relative_to(root)), file.read_text(encoding="utf-8"))
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
        if "_pb2" not in file.name
    ]


def read_revision(revision: str) -> list[Module]:
    """Read the packages as they were in a revision of git."""
    command = ["git", "archive", revision, *PACKAGES]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(directory, filter="data")
        return read_tree(Path(directory))


def room(name: str) -> str | None:
    """Return the package a module counts to: launch, actors, or a package or module of rayhf."""
    top, *rest = name.split(".")
    if top not in PACKAGES:
        return None
    return f"{top}.{rest[0]}" if top == "rayhf" and rest else top


def two_way_pairs(modules: Sequence[Module]) -> list[tuple[str, str]]:
    """Return the pairs of packages that import each other.

    rayhf/__init__.py, the Python API, is left out: it names classes of all packages.
    """
    arrows = set()
    for module in modules:
        if module.path == "rayhf/__init__.py":
            continue
        importer = room(module.path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        arrows |= {(importer, room(name)) for name in module.imports()}
    return sorted((a, b) for a, b in arrows if a and b and a < b and (b, a) in arrows)


def words(text: str) -> list[str]:
    """Split identifiers: PairwiseRuleConfig -> pairwise, rule, config."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", text)]


def mentions(module: Module, name: str) -> set[int]:
    """Return the lines that name a plugin outside of its own classes and functions.

    A name is an identifier or a string without spaces.
    """
    own = {
        line
        for node in module.tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and contains(node.name, name)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return {
        token.start[0]
        for token in module.code
        if token.start[0] not in own
        and (
            token.type == tokenize.NAME
            or (token.type == tokenize.STRING and " " not in token.string)
        )
        and contains(token.string, name)
    }


def contains(text: str, name: str) -> bool:
    parts = words(text)
    wanted = words(name)
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))


def edits(modules: Sequence[Module], example: Example) -> str:
    """Count the lines that must name a plugin besides its own code, and their files."""
    found = [len(mentions(m, example.name)) for m in modules if m.path not in example.own]
    places = [count for count in found if count]
    return f"{sum(places)} in {len(places)}"


def loop_lines(modules: Sequence[Module]) -> dict[str, int]:
    """Return the lines of code of each loop, with its config and its loss.

    Lines without docstrings, comments and blank ones: of the module that the registry names, and of
    the modules of LOOP_PACKAGES that only this one's imports lead to.
    """
    by_name = {m.path.removesuffix(".py").replace("/", "."): m for m in modules}
    starts = {name: path.partition(":")[0] for name, path in ALGORITHMS.builtin.items()}
    reached = {name: _reached(start, by_name) for name, start in starts.items()}
    shared = Counter(module for found in reached.values() for module in found)
    return {
        name: sum(
            len({token.start[0] for token in by_name[module].code})
            for module in found
            if shared[module] == 1 or module == starts[name]
        )
        for name, found in reached.items()
    }


def loops_text(modules: Sequence[Module]) -> str:
    """Return the lines of code of the loops, the shortest first, and their median."""
    lines = loop_lines(modules)
    shortest_first = sorted(lines, key=lines.__getitem__)
    listed = ", ".join(f"{name} {lines[name]}" for name in shortest_first)
    return (
        "Lines of code of a loop, with its config and its loss and without docstrings: median "
        f"{statistics.median(lines.values()):.0f}. {listed}."
    )


def _reached(start: str, by_name: Mapping[str, Module]) -> set[str]:
    """Return the modules of LOOP_PACKAGES that a module's imports lead to, itself included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in found and name.startswith(LOOP_PACKAGES):
            found.add(name)
            imports = list(by_name[name].imports())
            waiting += imports + [each.rpartition(".")[0] for each in imports]
    return found


def spread(values: Iterable[int]) -> str:
    """Median / 95th percentile / maximum."""
    numbers = sorted(values)
    p95 = statistics.quantiles(numbers, n=20, method="inclusive")[-1]
    return f"{statistics.median(numbers):.0f} / {p95:.0f} / {numbers[-1]}"


def measure(modules: Sequence[Module]) -> dict[str, str]:
    """Return every figure that can be read from the code, as text."""
    lines = sum(len(m.lines) for m in modules)
    code_lines = sum(len({token.start[0] for token in m.code}) for m in modules)
    comments = sum(token.type == tokenize.COMMENT for m in modules for token in m.tokens)
    names = [token.string for m in modules for token in m.code if token.type == tokenize.NAME]
    pairs = two_way_pairs(modules)
    figures = {
        "files": str(len(modules)),
        "lines": f"{lines:,}",
        "lines of a file: median / p95 / max": spread(len(m.lines) for m in modules),
        "lines of a function: median / p95 / max": spread(
            n for m in modules for n in m.functions()
        ),
        f"lines over {LINE_LENGTH} characters": str(
            sum(len(line) > LINE_LENGTH for m in modules for line in m.lines)
        ),
        "two-way package pairs": str(len(pairs)),
        "`Any` per 1,000 lines": f"{1000 * names.count('Any') / lines:.1f}",
        "comments per 100 lines of code": f"{100 * comments / code_lines:.1f}",
    }
    for plugin, example in EXAMPLES.items():
        title = f"lines that register the {plugin} `{example.name}`, in files"
        figures[title] = edits(modules, example)
    return figures


def needs_one_line(registry: Registry) -> bool:
    """Whether a class in a file of its own becomes a plugin by one line in the registry's table."""

    class Temporary:
        class Config(PluginConfig):
            size: int = 1

    module = ModuleType("temporary_plugin")
    module.Temporary = Temporary  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    extended = Registry(
        registry.kind,
        registry.group,
        {**registry.builtin, "temporary": "temporary_plugin:Temporary"},
    )
    adapter = TypeAdapter[Any](Annotated[PluginConfig, extended])
    try:
        accepted = adapter.validate_python({"type": "temporary", "size": 2}).size == 2
        adapter.validate_python({"type": "temporary", "sise": 2})
    except ValidationError as error:
        return accepted and "sise" in str(error)
    finally:
        del sys.modules[module.__name__]
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("revision", nargs="?", default=BEFORE)
    parser.add_argument("--record", action="store_true", help="write the table into RESULTS.md")
    arguments = parser.parse_args()
    old = read_revision(arguments.revision)
    new = read_tree(ROOT)
    before = measure(old)
    rows = [(name, before[name], value) for name, value in measure(new).items()]
    doors = ", ".join(r.kind for r in REGISTRIES.values() if needs_one_line(r))
    note = f"Added by one file and one line in a table (tried for each): {doors}."

    console = Console()
    table = Table("figure", arguments.revision, "now")
    for row in rows:
        table.add_row(*row)
    console.print(table, note)
    loops = loops_text(new)
    console.print(loops)
    for state, modules in ((arguments.revision, old), ("now", new)):
        for a, b in two_way_pairs(modules):
            console.print(f"{state}: {a} and {b} import each other")
    if arguments.record:
        head = [f"| figure | {arguments.revision} | now |", "|---|--:|--:|"]
        body = [f"| {' | '.join(row)} |" for row in rows]
        how = "`python -m tests.bench.shape`: rayhf, actors and launch without generated modules."
        lines = [how, "", *head, *body, "", note, "", loops]
        put_section("## Shape of the code", "\n".join(lines))


if __name__ == "__main__":
    main()
