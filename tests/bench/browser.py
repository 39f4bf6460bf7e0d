"""Headless Chromium and a dashboard as processes, for the benchmarks of pages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def chromium(folder: Path | None = None) -> Iterator[Any]:
    """Start a browser; with a folder for its script, at the lowest priority."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("there is no Chromium; requirements/browser.sh installs it")
    if folder is not None:
        script = folder / "chromium"
        script.write_text(f'#!/bin/sh\nexec nice -n 19 {path} "$@"\n')
        script.chmod(0o755)
        path = str(script)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def dashboard(run: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serve a run; yields the URL and the server's process."""
    command = [sys.executable, "-u", "-m", "launch.main", "dashboard", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(word for word in server.stdout.readline().split() if word.startswith("http"))
            yield url, psutil.Process(server.pid)
        finally:
            server.terminate()
