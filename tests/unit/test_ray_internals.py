"""Private parts of Ray that actors/ray_internals.py uses: present, with the expected signatures."""

from __future__ import annotations

import inspect
import mmap
import re
import zipfile
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env import packaging
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import available_resources_per_node

from actors.ray_internals import LOCAL_ENV, create_package, dead_processes, job_config

ROOT = Path(__file__).parents[2]


def test_no_other_file_uses_private_parts() -> None:
    private = re.compile(r"\bray\._\w|_raylet|GcsClient")
    users = {
        str(file.relative_to(ROOT))
        for room in ("rayhf", "actors", "launch")
        for file in (ROOT / room).rglob("*.py")
        if private.search(file.read_text())
    }
    assert users == {"actors/ray_internals.py"}


def test_free_resources_takes_no_arguments() -> None:
    assert not inspect.signature(available_resources_per_node).parameters


def test_create_package_takes_the_arguments_we_give() -> None:
    parameters = inspect.signature(packaging.create_package).parameters
    assert [*parameters][:2] == ["module_path", "target_path"]
    assert {"include_gitignore", "excludes", "logger"} <= parameters.keys()


def test_package_leaves_out_ignored_and_excluded_files(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("kept.py", "ignored.bin", "excluded.pem"):
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.bin\n")
    create_package(folder, tmp_path / "package.zip", excludes=["*.pem"])
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        assert sorted(archive.namelist()) == [".gitignore", "kept.py"]


def test_gcs_client_has_the_request_we_send() -> None:
    from ray._raylet import GcsClient, InnerGcsClient

    assert "timeout" in inspect.signature(InnerGcsClient.get_all_node_info).parameters
    assert "InnerGcsClient" in (GcsClient.__doc__ or "")


@pytest.mark.parametrize("name", sorted(LOCAL_ENV))
def test_flag_is_one_of_rays_core(name: str) -> None:
    library = Path(ray.__file__).parent / "_raylet.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        assert text.find(name.removeprefix("RAY_").encode()) >= 0


def test_job_config_has_the_option_we_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/integration/test_user_folder.py shows that it works."""
    config = job_config()
    assert config is not None and config._client_job is True
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert job_config() is None


def test_processes_of_a_node_have_names_and_states() -> None:
    from ray._private.node import Node

    assert "process_type" in inspect.getsource(Node.dead_processes)
    assert dead_processes() == []  # no cluster was started here
