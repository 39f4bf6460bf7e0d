"""Attacks on a run directory: flipped bits, links, locks, foreign and stray files.

They are played on campaigns with the fakes of tests/unit; no Ray is started.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tests.chaos.attacks.attack import Attack

sys.path.append(str(Path(__file__).parents[2] / "unit"))
import storage_attacks as played

ATTACKS: list[Attack] = [
    Attack(
        name="one flipped bit in samples, then verify --deep",
        before="unseen 52 of 60",
        play=partial(played.flipped_bits, tries=60, files="samples/*.parquet"),
    ),
    Attack(
        name="one flipped bit in examples, then verify --deep",
        before="unseen 42 of 60",
        play=partial(played.flipped_bits, tries=60, files="examples/*.parquet"),
    ),
    Attack(
        name="one flipped bit in metrics.jsonl, then verify --deep",
        before="unseen 98 of 200",
        play=partial(played.flipped_bits, tries=200, files="metrics.jsonl"),
    ),
    Attack(
        name="one flipped bit in policy/, then verify --deep and export",
        before="unseen 60 of 60",
        play=partial(played.flipped_bits, tries=60, files="policy/*"),
    ),
    Attack(
        name="one flipped bit in campaign.json, config.yaml or checksums.jsonl",
        before="not tried",
        play=partial(played.flipped_bits, tries=60, files="c*.*"),
    ),
    Attack(
        name="stray files of editors and network file systems",
        before="commits and resumes crash",
        play=played.stray_files,
    ),
    Attack(
        name="symbolic links inside a run directory",
        before="followed: read, written, deleted and exported",
        play=played.symbolic_links,
    ),
    Attack(
        name="rm .lock under a running launcher",
        before="two launchers commit",
        play=played.removed_lock,
    ),
    Attack(
        name="run.dir with foreign content",
        before="policy/ and samples/ are deleted",
        play=played.foreign_directories,
    ),
    Attack(
        name="config.yaml deleted or damaged",
        before="another seed continues; raw YAML errors",
        play=played.damaged_config,
    ),
    Attack(
        name="campaign.json deleted, checkpoints damaged",
        before="the second try starts from scratch and deletes samples",
        play=played.lost_campaign_json,
    ),
    Attack(
        name="too many open files while checkpoints are read",
        before="a good checkpoint is set aside",
        play=played.too_many_open_files,
    ),
    Attack(
        name="a damaged line of metrics.jsonl, a damaged file of inbox/taken",
        before="the line is dropped; crash at every start",
        play=played.damaged_records,
    ),
    Attack(
        name="a label of an iteration whose checkpoint is damaged",
        before="exit 2 at every start",
        play=played.label_on_damaged_checkpoint,
    ),
]
