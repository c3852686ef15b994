"""The table of sampling parameters: complete, consistent, and the source of everything that lists parameters."""

from __future__ import annotations

import dataclasses
import inspect
import runpy

import pytest
from project import ROOT

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling import transforms
from llm_edge.runtime.sampling.params import PARAMETERS, SamplingParams


def test_the_table_describes_every_field() -> None:
    assert list(PARAMETERS) == [field.name for field in dataclasses.fields(SamplingParams)]
    for name, spec in PARAMETERS.items():
        assert spec.name == name
        assert spec.checked(spec.default) == spec.default == getattr(SamplingParams(), name)
        assert spec.title
        assert spec.help
        assert not spec.help.endswith(".")
        assert (spec.between is not None) == (spec.kind in ("float", "int"))
        assert (spec.slider is not None) == (spec.kind in ("float", "int"))
    orders = [spec.order for spec in PARAMETERS.values() if spec.order < 100]
    assert len(set(orders)) == len(orders)


def test_sliders_stay_within_what_a_parameter_allows() -> None:
    for spec in PARAMETERS.values():
        if spec.slider is not None:
            for value in (spec.slider.low, spec.slider.high, spec.slider.low + spec.slider.step):
                spec.checked(int(value) if spec.kind == "int" else value)
            if spec.optional:
                spec.checked(spec.slider.start)


@pytest.mark.parametrize("api", ["openai", "llamacpp", "generation_config"])
def test_api_names_map_to_one_parameter_each(api: str) -> None:
    names = [name for spec in PARAMETERS.values() if (name := getattr(spec.api, api))]
    assert len(names) >= 7
    assert len(set(names)) == len(names)


def test_every_filter_belongs_to_a_parameter() -> None:
    assert transforms.FILTERS.keys() <= PARAMETERS.keys()
    for keep in transforms.FILTERS.values():
        assert len(inspect.signature(keep).parameters) == 2


@pytest.mark.parametrize("name", [name for name, spec in PARAMETERS.items() if spec.between])
def test_values_out_of_range_are_rejected_by_name(name: str) -> None:
    spec = PARAMETERS[name]
    assert spec.between is not None
    low, high = spec.between
    for wrong in (low - 1, high + 1, float("nan"), "1", True, [1]):
        with pytest.raises(ParameterError, match=f"^{name}: .* is not allowed, give an? "):
            SamplingParams(**{name: wrong})


def test_the_documentation_is_generated_from_the_table() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "sampling.py"))["page"]()
    assert (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8") == page, "run `make docs`"
