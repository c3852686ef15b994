"""Chat parameters and presets: typed and stepped values, validation, saving and applying presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_edge.chat.parameters import EDITABLE, ChatParameters, summarize
from llm_edge.chat.presets import MODEL_DEFAULTS, Presets
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.presets import PRESETS, apply_preset

DEFAULTS = SamplingParams(temperature=0.7, top_p=0.95, repetition_penalty=1.1, stop=("END",))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "1.25", 1.25),
        ("temperature", " 0 ", 0.0),
        ("top_k", "40", 40),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("seed", "off", None),
        ("seed", "", None),
        ("logprobs", "0", 0),
        ("reasoning_budget", "0", 0),
        ("stop", "User:\n\\n\\n\nC:\\\\x", ("User:", "\n\n", "C:\\x")),
        ("stop", "", ()),
        ("presence_penalty", "-2", -2.0),
        ("dry_multiplier", "0.8", 0.8),
    ],
)
def test_typed_values_reach_the_runtime(name: str, text: str, value: Any) -> None:
    parameters = ChatParameters(DEFAULTS)
    parameters.set_text(name, text)
    assert getattr(parameters.params, name) == value
    again = ChatParameters(DEFAULTS)
    again.set_text(name, parameters.text(name))  # displayed values can be typed
    assert again.params == parameters.params


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "warm"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "1e999"),
        ("top_p", "1.5"),
        ("top_k", "1.5"),
        ("top_k", "9" * 30),
        ("max_tokens", "0"),
        ("seed", "-1"),
        ("logprobs", "21"),
        ("json_schema", "{"),
        ("json_schema", "[]"),
    ],
)
def test_invalid_values_are_rejected_in_one_line_and_change_nothing(name: str, text: str) -> None:
    parameters = ChatParameters(DEFAULTS)
    parameters.set_text("top_k", "7")
    before = parameters.params
    with pytest.raises(ParameterError) as refusal:
        parameters.set_text(name, text)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert parameters.params == before
    assert parameters.changed == {"top_k": 7}


def test_the_models_default_value_is_not_a_change() -> None:
    parameters = ChatParameters(DEFAULTS)
    for parameter in EDITABLE.values():
        parameters.set_text(parameter.name, parameters.text(parameter.name))
    assert parameters.changed == {}
    assert parameters.params == DEFAULTS


@pytest.mark.parametrize(
    "parameter",
    [parameter for parameter in EDITABLE.values() if parameter.kind not in ("strings", "text")],
    ids=lambda k: k.name,
)
def test_stepping_stops_at_the_limits(parameter: Any) -> None:
    parameters = ChatParameters(SamplingParams(max_tokens=65))
    start = parameters.value(parameter.name)
    parameters.step(parameter.name, 1)
    high, low = (parameter.slider.high, parameter.slider.low) if parameter.slider else (True, False)
    assert parameters.value(parameter.name) != start or start == high
    parameters.step(parameter.name, 10_000_000_000)
    assert parameters.value(parameter.name) == high
    parameters.step(parameter.name, -10_000_000_000)
    lowest = None if parameter.optional else low
    assert parameters.value(parameter.name) == lowest
    json.dumps(parameters.changed, allow_nan=False)


def test_a_schema_becomes_a_constraint() -> None:
    parameters = ChatParameters(DEFAULTS)
    parameters.set_text("json_schema", " {} ")
    assert parameters.params.constraint == Constraint.json()
    parameters.set_text("json_schema", '{"type": "string"}')
    assert parameters.params.constraint == Constraint.json_schema({"type": "string"})
    parameters.set_text("json_schema", "")
    assert parameters.params == DEFAULTS


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "objec"}', "objec"),
        ('{"$ref": "#/nowhere"}', "/nowhere"),
        ('{"type": "string", "minLength": 5, "maxLength": 2}', "nothing can match it"),
        ('{"type": "string", "pattern": "("}', "a group is not closed"),
    ],
)
def test_an_unsatisfiable_schema_is_rejected_before_generation(schema: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        Constraint.json_schema(schema).check()


@pytest.mark.parametrize("schema", ["{}", '{"type": "object", "properties": {"a": {"enum": ["x", 1]}}}'])
def test_a_satisfiable_schema_is_accepted(schema: str) -> None:
    Constraint.json_schema(schema).check()


@pytest.mark.parametrize("name", PRESETS)
def test_chat_presets_equal_those_of_the_runtime(tmp_path: Path, name: str) -> None:
    odd = SamplingParams(temperature=0.2, typical_p=0.5, top_n_sigma=1.0, xtc_threshold=0.3, min_p=0.2)
    for defaults in (DEFAULTS, odd):
        parameters = ChatParameters(defaults, {"max_tokens": 9, "top_k": 3, "system": "Be brief."})
        expected = apply_preset(name, parameters.params)
        Presets(Settings(tmp_path)).apply("m", name, parameters)
        assert parameters.params == expected
        assert parameters.system == "Be brief."
        assert Presets(Settings(tmp_path)).matching("m", parameters) == name
        assert (
            ChatParameters(defaults, json.loads(json.dumps(parameters.changed))).params == expected
        )  # as saved with an answer


def test_presets_are_saved_per_model(tmp_path: Path) -> None:
    presets = Presets(Settings(tmp_path))
    parameters = ChatParameters(DEFAULTS, {"temperature": 0.1, "stop": ["a\nb"], "system": "Be brief."})
    assert presets.save("m", "  my \x1b[31m own ", parameters) == "my [31m own"
    again = Presets(Settings(tmp_path))
    assert again.own("m") == ["my [31m own"]
    assert again.own("another") == []
    assert [*again.offered("m")][:2] == [MODEL_DEFAULTS, "my [31m own"]
    fresh = ChatParameters(DEFAULTS, {"top_k": 4})
    again.apply("m", "my [31m own", fresh)
    assert fresh.changed == parameters.changed
    assert again.matching("m", fresh) == "my [31m own"
    again.apply("m", MODEL_DEFAULTS, fresh)
    assert fresh.params == DEFAULTS
    again.delete("m", "my [31m own")
    assert Presets(Settings(tmp_path)).own("m") == []


def test_own_presets_can_be_replaced_but_built_in_ones_cannot(tmp_path: Path) -> None:
    presets = Presets(Settings(tmp_path))
    for temperature in (0.1, 0.2):
        presets.save("m", "mine", ChatParameters(DEFAULTS, {"temperature": temperature}))
    parameters = ChatParameters(DEFAULTS)
    presets.apply("m", "mine", parameters)
    assert parameters.changed == {"temperature": 0.2}
    for name in ("greedy", MODEL_DEFAULTS, "", "   ", "\x1b\x07", "x" * 41):
        with pytest.raises(ParameterError):
            presets.save("m", name, parameters)
    for name in ("greedy", "nobody's", ""):
        with pytest.raises(ParameterError):
            presets.delete("m", name)


@pytest.mark.parametrize(
    "changed", [{"temperature": "hot"}, {"temperature": 1e400}, {"nothing": 1}, {"system": 3}, {"top_k": True}]
)
def test_an_invalid_preset_is_reported_and_changes_nothing(tmp_path: Path, changed: dict[str, Any]) -> None:
    text = json.dumps({"presets": {"m": {"bad": {"min_p": 0.1, **changed}}}})
    (tmp_path / "settings.json").write_text(text, encoding="utf-8")
    presets, parameters = Presets(Settings(tmp_path)), ChatParameters(DEFAULTS, {"top_k": 4})
    with pytest.raises(ParameterError, match="the preset bad cannot be used"):
        presets.apply("m", "bad", parameters)
    assert parameters.changed == {"top_k": 4}


def test_the_summary_of_parameters_is_one_line() -> None:
    line = summarize(
        {"temperature": 0.3, "seed": None, "stop": ["\n"], "system": "Be\nbrief. " * 20, "xtc_threshold": 0.2}
    )
    assert line.startswith("temperature 0.3 · seed off · stop strings '\\n' · system prompt Be brief.")
    assert line.endswith("… · XTC threshold 0.2")
    assert "\n" not in line
    assert summarize({}) == ""
