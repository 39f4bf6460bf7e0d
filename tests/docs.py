"""Generated parts of docs/: `python -m tests.docs` writes them, tests/unit/test_readme.py compares.

docs/metrics.md is the catalog of metrics. In any page, a code block that follows a line with
nothing but the name of a file, "`path`:", holds that file.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from rayhf.monitoring.catalog import METRICS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILE_BLOCK = re.compile(r"^(`([\w/.]+)`:\n\n```\w+\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
_METRICS_HEAD = """\
# Metrics

Every metric of a campaign: one object per iteration in `metrics.jsonl`, mirrored by trackers. `<...>` stands for a
name of the campaign's own. "share" is a number from 0 to 1. `rayhf list metrics` prints the same table.
Generated from `rayhf/monitoring/catalog.py` by `python -m tests.docs`.
"""


def metrics_page() -> str:
    """Return docs/metrics.md: one table per writer."""
    lines = [_METRICS_HEAD]
    for writer, metrics in groupby(METRICS, key=lambda metric: metric.writer):
        lines += [f"## {writer[:1].upper()}{writer[1:]}", "", "| metric | unit | meaning |"]
        lines += ["|---|---|---|"]
        for metric in metrics:
            meaning = metric.meaning.replace("|", r"\|")
            lines.append(f"| `{metric.name}` | {metric.unit} | {meaning} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def with_files(page: str) -> str:
    """Return the page with the current content of the files that it shows."""

    def block(match: re.Match[str]) -> str:
        head, name, _, end = match.groups()
        return f"{head}{(ROOT / name).read_text(encoding='utf-8')}{end}"

    return FILE_BLOCK.sub(block, page)


def generated() -> dict[Path, str]:
    """Return every page of docs/ as it should be."""
    pages = {page: with_files(page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md")}
    return pages | {DOCS / "metrics.md": metrics_page()}


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
