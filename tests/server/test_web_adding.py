"""The page's dialog that adds models, in Chromium, with real uploads and exports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsing
import pytest
from serving import Served

from llm_edge.server.config import JobConfig


@pytest.fixture(scope="module")
def served(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adding")
    shutil.copytree(models_folder / "tiny", folder / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LLM_EDGE_DATA", "LLM_EDGE_CONFIG"):
            patch.setenv(name, str(folder))
        server = Served(folder / "models", models={"precision": "fp32"}, jobs=JobConfig(uploads=True))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def dialog(served: Served) -> Iterator[Any]:
    """The open dialog; the tests fail if the browser reports an error."""
    problems: list[str] = []
    with browsing.chromium() as browser:
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(served.url)
        page.locator(".quick").first.wait_for()
        page.evaluate("document.getElementById('add-model').click()")
        yield page
    assert [each for each in problems if "400" not in each] == []


def send(page: Any, files: list[Path], precision: str = "fp32") -> None:
    page.select_option("dialog select", precision)
    page.get_by_label("From files").set_input_files(files)
    page.get_by_role("button", name="Upload and convert").click()


def test_the_dialog_says_what_the_server_does_not_allow(dialog: Any) -> None:
    dialog.get_by_text("Off: start llm-serve with --allow-downloads.").wait_for()


def test_other_files_than_a_checkpoint_are_refused(dialog: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    send(dialog, [tmp_path / "notes.txt"])
    dialog.get_by_role("alert").filter(has_text="notes.txt").wait_for()
    assert dialog.locator(".jobs li").count() == 0


def test_a_checkpoint_that_cannot_be_exported_shows_the_reason(
    dialog: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nosuch"}')
    send(dialog, [path for path in (tmp_path / "broken").iterdir() if path.is_file()])
    job = dialog.locator(".jobs li").first
    job.get_by_text("Failed").wait_for()
    assert "nosuch" in job.locator(".problem").inner_text()
    job.get_by_role("button", name="Remove").click()
    dialog.locator(".jobs li").wait_for(state="detached")


@pytest.mark.slow
def test_a_checkpoint_is_uploaded_converted_compared_and_chosen(
    dialog: Any, served: Served, tiny_checkpoint: Path
) -> None:
    dialog.evaluate("window.seen = new Set()")
    dialog.evaluate(
        "new MutationObserver(() => document.querySelectorAll('.jobs .hint').forEach((e) => seen.add(e.textContent)))"
        ".observe(document.querySelector('.jobs'), {childList: true, subtree: true})"
    )
    send(dialog, [path for path in tiny_checkpoint.iterdir() if path.is_file()])
    job = dialog.locator(".jobs li").first
    job.get_by_text("Ready").wait_for()
    assert job.locator("th[scope=row]").all_inner_texts() == ["fp32"]
    assert "100.0 %" in job.inner_text()  # fp32 chooses the same tokens as PyTorch
    stages = dialog.evaluate("[...seen]")
    assert any("%" in stage or ":" in stage for stage in stages), stages
    model = job.locator("strong").inner_text()
    assert (served.config.models.folder / model / "manifest.json").is_file()
    dialog.keyboard.press("Escape")
    dialog.wait_for_function("(name) => document.getElementById('model').value.startsWith(name)", arg=model)
    dialog.fill("#question", "Hello")
    dialog.click("#send")
    dialog.locator(".message.answer .actions").wait_for()
