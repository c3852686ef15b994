"""Chromium without a screen, and axe-core, for tests of the web page."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_AXE = "axe-core@4.14.1"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped if there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        yield browser
        browser.close()


def axe_script(folder: Path) -> str:
    """The source of axe-core, installed into a folder; the test is skipped if npm cannot install it."""
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("no npm, which installs axe-core")
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), _AXE]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, cwd=folder)
        if done.returncode:
            pytest.skip(f"npm cannot install axe-core: {done.stderr[-300:]}")
    return script.read_text(encoding="utf-8")
