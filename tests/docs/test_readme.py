"""README.md: the example runs as printed, and the listed options exist."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from project import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_embedding_example_runs(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = re.search(r"## Embed\n\n((?:    .*\n|\n)+)", README)
    assert section is not None
    code = textwrap.dedent(section[1])
    assert "artifacts/smollm2-135m" in code
    exec(compile(code.replace("artifacts/smollm2-135m", str(tiny_bundle)), "README.md", "exec"), {})
    assert re.search(r" (length|stop) [0-9.]+$", capsys.readouterr().out.rstrip())


def test_the_options_of_llm_export_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_edge.exporter.cli import app

    with pytest.raises(SystemExit):
        app(["--help"])
    shown = capsys.readouterr().out
    section = README.partition("## Export")[2].partition("## Chat")[0]
    listed = set(re.findall(r"^    (--?[a-z-]+)", section, flags=re.MULTILINE))
    options = listed | set(re.findall(r" (--[a-z-]+)", section))
    assert len(listed) >= 8
    assert all(option in shown for option in options)


def test_the_options_of_llm_chat_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_edge.tui.cli import app

    with pytest.raises(SystemExit):
        app(["--help"])
    shown = capsys.readouterr().out
    guide = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    section = README.partition("## Chat")[2].partition("## Embed")[0]
    options = set(re.findall(r"[ `](--[a-z-]+)", section + guide))
    assert {"--ask", "--plain", "--serve", "--fake", "--save", "--no-stdin"} <= options
    assert all(option in shown for option in options)
    assert (ROOT / "docs" / "pictures" / "conversation.svg").is_file()
