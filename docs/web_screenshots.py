"""Writes screenshots of the web page as PNG: `python docs/web_screenshots.py BUNDLE docs/pictures` (`make pictures`).

Needs Chromium. The page is that of a real server, and the answers are the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_edge.runtime.command import run
from llm_edge.runtime.errors import InputError, MachineError

_QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")
_TIMEOUT = 120_000  # milliseconds


@contextlib.contextmanager
def served(bundle: Path) -> Iterator[str]:
    """Serve a bundle, with no conversations yet; yields the URL."""
    program = Path(sys.executable).with_name("llm-serve")
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--models", bundle.absolute().parent, "--model", bundle.name, "--port", "0"]
        env = {**os.environ, "LLM_EDGE_DATA": folder, "LLM_EDGE_CONFIG": folder}
        server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=env)  # noqa: S603
        assert server.stdout is not None
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                raise MachineError("llm-serve did not start")
            yield found[0]
        finally:
            server.terminate()
            server.wait()


def take(browser: Any, url: str, folder: Path) -> None:
    """Ask the questions, and write the pictures."""
    page = browser.new_page(viewport={"width": 1280, "height": 760}, color_scheme="light")
    page.set_default_timeout(_TIMEOUT)
    page.goto(url)
    page.locator("#model-state[data-state=loaded]").wait_for()
    for question in _QUESTIONS:  # each in a conversation
        page.click("#new-chat")
        page.fill("#question", question)
        page.click("#send")
        page.locator(".message.answer .actions").wait_for()
    page.locator(".chat-link").nth(len(_QUESTIONS) - 1).wait_for()
    page.screenshot(path=folder / "page.png")
    phone = browser.new_page(
        viewport={"width": 390, "height": 720}, color_scheme="dark", is_mobile=True, has_touch=True
    )
    phone.goto(page.url)
    phone.locator(".message.answer .actions").last.wait_for()
    phone.screenshot(path=folder / "page-phone.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: parse the arguments and write the screenshots."""
    parser = argparse.ArgumentParser(description="Write screenshots of the web page as PNG.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)

    def write_all() -> None:
        from playwright.sync_api import sync_playwright

        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise InputError("no Chromium: install it, for example with apt-get install chromium")
        options.folder.mkdir(parents=True, exist_ok=True)
        with served(options.bundle) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--headless", "--no-sandbox"])
            take(browser, url, options.folder)
            browser.close()

    sys.exit(run(write_all))


if __name__ == "__main__":
    main()
