"""`--cache-dir`: the prefixes that requests share survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Served

SYSTEM = "You are a terse assistant who answers in one word and never explains. " * 4


@pytest.fixture
def restarted(models_folder: Path, tmp_path: Path) -> Callable[..., Served]:
    """Starts a server with a cache folder."""

    def start(**limits: Any) -> Served:
        shared = {"default": "tiny", "precision": "fp32", "cache_dir": tmp_path / "cache" / "prefixes"}
        return Served(models_folder, models={**shared, **limits})

    return start


def ask(server: Served, question: str, system: str = SYSTEM) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    found = httpx2.post(f"{server.url}/v1/chat/completions", json=body).json()
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "prefixes").glob("*"))


def test_a_shared_system_prompt_is_cached_after_a_restart(restarted: Callable[..., Served], tmp_path: Path) -> None:
    server = restarted()
    first = ask(server, "One?")
    second = ask(server, "Two?")
    ask(server, "A secret", system="Only this request has this system prompt, so it is not saved.")
    server.stop()
    (saved,) = files(tmp_path)
    assert saved.stat().st_size > 0
    again = restarted()
    answer, cached = ask(again, "Two?")
    again.stop()
    assert answer == second[0]
    assert first[1] == 0
    assert cached >= 50


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 10_000])
def test_damaged_files_are_ignored(restarted: Callable[..., Served], tmp_path: Path, content: bytes) -> None:
    server = restarted()
    wanted = [ask(server, question) for question in ("One?", "Two?")]
    server.stop()
    (saved,) = files(tmp_path)
    damaged = content or saved.read_bytes()[:-100]
    saved.write_bytes(damaged)
    (saved.parent / "notes.txt").write_text("not ours")
    again = restarted()
    assert ask(again, "One?")[0] == wanted[0][0]
    again.stop()
    assert (saved.parent / "notes.txt").read_text() == "not ours"


def test_the_folder_is_bounded(restarted: Callable[..., Served], tmp_path: Path) -> None:
    server = restarted(cache_bytes=400_000)
    for number in range(6):
        for question in ("One?", "Two?"):
            ask(server, question, system=f"{number} {SYSTEM}")
    server.stop()
    assert files(tmp_path)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 400_000


def test_a_folder_that_cannot_be_written_ends_nothing(restarted: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    server = restarted()
    for question in ("One?", "Two?"):
        assert ask(server, question)[0] is not None
    server.stop()
