"""The table of architectures in docs/families.md and in `llm-export --families`."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from project import ROOT

from llm_edge.exporter.families import GENERAL, Route, families, print_families
from llm_edge.model.registry import BUILT_IN


@pytest.fixture(scope="module")
def page_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "docs" / "families_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_code(page_writer: ModuleType) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page_writer.written(page) == page


def test_every_architecture_has_one_route() -> None:
    routes = families()
    assert not set(GENERAL) & set(BUILT_IN)
    assert all(routes[kind] is Route.OWN for kind in BUILT_IN)
    assert {kind for kind, route in routes.items() if route is Route.GENERAL} == set(GENERAL)


def test_architectures_exported_through_transformers_are_known_to_it() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(GENERAL) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        print_families(wanted=True)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in families())
