"""docs/operating.md, "Promises and their tests": every named test and attack exists."""

import ast
import re

import pytest

from tests.chaos.attacks import doors, ends, rules, storage
from tests.docs import DOCS, ROOT

SECTION = (DOCS / "operating.md").read_text().split("### Promises and their tests")[1]
TABLE = SECTION.split("\n## ")[0].partition("|---|---|\n")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line
]
ATTACKS = {attack.name for part in (storage, doors, rules, ends) for attack in part.ATTACKS}


TESTS = {
    node.name
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
}


def test_table_is_read():
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_named_tests_exist(row):
    names = re.findall(r"`([^`]+)`", row[1])
    assert names
    assert set(names) <= TESTS | ATTACKS
