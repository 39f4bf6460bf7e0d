"""One HTML file about one or several runs, within a limit on its size.

Facts, curves and timelines are complete. Of the runs' prompts, as many are in the file as fit:
spread evenly over iterations, those with human labels and failed scores first. The page says how
many.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError
from rayhf.run_dir.files import write_atomic
from rayhf.view.groups import read_groups
from rayhf.view.heldout import heldout_answers, heldout_prompts
from rayhf.view.overview import overview, timeline
from rayhf.view.page import report_page
from rayhf.view.run import Run
from rayhf.view.samples import read_columns

DATA_BYTES = 3_300_000
"""Limit on the compressed data. In base64, with plotly.js (4.8 MB), that stays below 10 MB."""
PLAIN_BYTES = 60_000_000
"""Limit on the data before compression: a browser reads so much in about a second."""
_HELDOUT = 20
"""Held-out prompts of each run."""
_TRIED = 6
"""Prompts from which the size of all others is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was written."""

    file: Path
    size: int
    """Bytes."""
    shown: int
    """Prompts whose samples are in the file."""
    total: int
    """Prompts of all iterations."""


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """Return runs under names that tell them apart.

    Raises ConfigError for what is not a run directory, and for the same one twice; CheckpointError
    for one that is damaged.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("the same run directory is given twice; expected different ones")
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in resolved]
    if len(set(names)) < len(names):
        names = [str(path) for path in resolved]
    runs = [Run(path, name) for path, name in zip(resolved, names, strict=True)]
    for run in runs:
        run.status()
    return runs


def write_report(paths: Sequence[Path], file: Path) -> Report:
    """Write the report of the runs in `paths` to `file`.

    Raises ConfigError and CheckpointError for runs that cannot be read, StorageError for a file
    that cannot be written.
    """
    runs = open_runs(paths)
    data, shown, total = _data(runs)
    title = ", ".join(run.run_id for run in runs)
    page = report_page(f"rayhf report: {title}", data).encode()
    write_atomic(file, page)
    return Report(file=file, size=len(page), shown=shown, total=total)


class _Compressed:
    """Gzip of a text that grows, within the limits."""

    def __init__(self) -> None:
        self._out = zlib.compressobj(6, wbits=31)
        self._parts: list[bytes] = []
        self._plain = 0
        self.size = 0
        """Bytes; since the last `flush` the compressor may hold up to about 100 kB more."""

    def add(self, text: str) -> None:
        """Append a text."""
        data = text.encode(errors="replace")
        self._plain += len(data)
        self._append(self._out.compress(data))

    def flush(self) -> None:
        """Make `size` exact."""
        self._append(self._out.flush(zlib.Z_SYNC_FLUSH))

    def _append(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)

    def fits(self, text: str) -> bool:
        """Whether the limits allow to append a text."""
        data = text.encode(errors="replace")
        if self._plain + len(data) > PLAIN_BYTES:
            return False
        room = DATA_BYTES - self.size
        return len(data) <= room or len(zlib.compress(data, 6)) <= room

    def finish(self) -> bytes:
        """Return everything."""
        return b"".join([*self._parts, self._out.flush()])


def _data(runs: Sequence[Run]) -> tuple[bytes, int, int]:
    """Return gzip of the page's data, and how many of how many prompts it has."""
    prompts = {run.run_id: _prompts(run) for run in runs}
    total = sum(len(each) for by in prompts.values() for each in by.values())
    head = {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "overview": overview(runs),
        "timelines": {run.run_id: timeline(run) for run in runs},
        "heldout": {run.run_id: _heldout(run) for run in runs},
    }
    text = json.dumps(head, allow_nan=False, ensure_ascii=False)
    data = _Compressed()
    data.add(f'{text[:-1]},"groups":[')
    shown = _add_groups(data, runs, prompts)
    counts = {"shown": shown, "total": total, "samples": {run.run_id: _rows(run) for run in runs}}
    data.add(f'],"sampled":{json.dumps(counts)}}}')
    return data.finish(), shown, total


def _encoded(group: dict[str, Any]) -> str:
    return json.dumps(group, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _rows(run: Run) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in run.tables("samples").values())


def _prompts(run: Run) -> dict[int, list[str]]:
    """Return the prompts of every iteration, in the order in which they are worth showing."""
    labels = {(iteration, prompt) for iteration, prompt, _ in run.labeled()}
    found = {}
    for iteration, file in run.tables("samples").items():
        table = read_columns(file, ["prompt_id", "outcome"])
        prompts = table["prompt_id"].to_pylist()
        outcomes = table["outcome"].to_pylist()
        failed = {
            prompt
            for prompt, outcome in zip(prompts, outcomes, strict=True)
            if outcome not in ("Scored", None)
        }
        distinct = _spread(list(dict.fromkeys(prompts)))
        # At most half of them: the rest is an even sample.
        urgent = [p for p in distinct if (iteration, p) in labels or p in failed]
        rest = [p for p in distinct if p not in failed and (iteration, p) not in labels]
        mixed = [p for pair in zip(urgent, rest, strict=False) for p in pair]
        found[iteration] = list(dict.fromkeys([*mixed, *urgent, *rest]))
    return found


def _spread(items: list[Any]) -> list[Any]:
    """Return the items such that every beginning of the list is spread evenly over all of them."""
    width = max(1, (len(items) - 1).bit_length())
    order = sorted(range(len(items)), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
    return [items[i] for i in order]


def _add_groups(
    data: _Compressed, runs: Sequence[Run], left: dict[str, dict[int, list[str]]]
) -> int:
    """Add prompts until the data are full; return how many.

    Every pass over the iterations reads as many prompts as fit by the mean size so far. Files are
    read as a whole: few passes matter.

    Args:
        data: where to.
        runs: their prompts take turns.
        left: by run and iteration, the prompts in the order in which they are worth showing.
    """
    shown = 0
    taken: Counter[tuple[str, int]] = Counter()
    data.flush()
    start = data.size
    mean = max((_group_bytes(run, left[run.run_id]) for run in runs), default=1)
    while any(prompts for by_iteration in left.values() for prompts in by_iteration.values()):
        if shown:
            data.flush()
            mean = (data.size - start) // shown
        count = max(1, (DATA_BYTES - data.size) // max(1, mean))
        for run, iteration, prompts in _shares(runs, left, taken, count):
            for group in read_groups(run, iteration, prompts):
                text = ("," if shown else "") + _encoded(group)
                if not data.fits(text):
                    return shown
                data.add(text)
                shown += 1
    return shown


def _shares(
    runs: Sequence[Run],
    left: dict[str, dict[int, list[str]]],
    taken: Counter[tuple[str, int]],
    count: int,
) -> list[tuple[Run, int, list[str]]]:
    """Move `count` prompts from `left` to `taken`: spread over iterations, the runs in turns."""
    places = []
    for run in runs:
        iterations = [i for i, prompts in left[run.run_id].items() if prompts]
        places += [(rank, run, iteration) for rank, iteration in enumerate(_spread(iterations))]
    # First those with the fewest prompts: a pass may end before the last one.
    places.sort(key=lambda place: (taken[place[1].run_id, place[2]], place[0]))
    each, extra = divmod(count, len(places))
    shares = []
    for number, (_, run, iteration) in enumerate(places):
        prompts = left[run.run_id][iteration]
        if quota := each + (number < extra):
            shares.append((run, iteration, prompts[:quota]))
            left[run.run_id][iteration] = prompts[quota:]
            taken[run.run_id, iteration] += quota
    return shares


def _group_bytes(run: Run, by_iteration: dict[int, list[str]]) -> int:
    """Return the mean compressed size of a group, from a few of the middle iteration."""
    if not by_iteration:
        return 1
    iteration = sorted(by_iteration)[len(by_iteration) // 2]
    groups = read_groups(run, iteration, by_iteration[iteration][:_TRIED])
    sizes = len(gzip.compress("".join(map(_encoded, groups)).encode(errors="replace"), 6))
    return sizes // max(1, len(groups))


def _heldout(run: Run) -> dict[str, Any]:
    prompts = _spread(heldout_prompts(run))[:_HELDOUT]
    answers = {p["prompt_id"]: heldout_answers(run, p["prompt_id"]) for p in prompts}
    return {"prompts": prompts, "answers": answers}
