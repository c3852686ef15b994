"""The install hint names a place that pip can install from."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from project import ROOT

from llm_edge.runtime import installation
from llm_edge.runtime.installation import install_hint


class Distribution:
    """An installed distribution whose origin is recorded as this URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read_text(self, name: str) -> str:
        assert name == "direct_url.json"
        return json.dumps({"url": self._url})


def test_a_checkout_is_installed_from_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_hint("export") == "pip install -e '.[export]'"
    monkeypatch.chdir(tmp_path)
    assert install_hint("tui") == f"pip install -e '{ROOT}[tui]'"


@pytest.mark.parametrize(("present", "expected"), [(True, "{wheel}[export]"), (False, "llm-edge[export]")])
def test_an_installed_package_is_installed_from_where_it_came(
    present: bool, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "llm edge.whl"
    if present:
        wheel.touch()
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "site-packages" / "runtime" / "installation.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(wheel.as_uri()))
    assert install_hint("export") == f"pip install '{expected.format(wheel=wheel)}'"
