"""A server with a tiny model, shared by the tests of a module."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served


@pytest.fixture(scope="session")
def models_folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two names for the tiny bundle."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "other"):
        shutil.copytree(tiny_bundle, folder / name)
    return folder


@pytest.fixture(scope="module")
def served(models_folder: Path) -> Iterator[Served]:
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32"})
    yield server
    server.stop()
