"""Damage, strangers and second launchers in a run directory: nothing is lost, nothing unseen."""

import pytest
import storage_attacks as attacks


def check(figures):
    tried, held, first = figures
    assert tried == held > 0, first


@pytest.mark.parametrize(
    "files",
    [
        "samples/*.parquet",
        "examples/*.parquet",
        "metrics.jsonl",
        "policy/*",
        "c*.*",
        "checkpoints/*/**/*",
    ],
)
def test_one_flipped_bit_is_seen(tmp_path, files):
    check(attacks.flipped_bits(tmp_path, 0, tries=8, files=files))


@pytest.mark.parametrize(
    "attack",
    [
        attacks.stray_files,
        attacks.symbolic_links,
        attacks.removed_lock,
        attacks.foreign_directories,
        attacks.damaged_config,
        attacks.lost_campaign_json,
        attacks.too_many_open_files,
        attacks.damaged_records,
        attacks.label_on_damaged_checkpoint,
    ],
)
def test_attack_holds(tmp_path, attack):
    check(attack(tmp_path, 0))
