"""`Presets`: named sets of parameter values, built-in ones and the user's for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.settings import Section, Settings
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.presets import DESCRIPTIONS, PRESETS

MODEL_DEFAULTS: Final = "Model defaults"
MAX_NAME: Final = 40  # characters

UserPresets = dict[str, dict[str, dict[str, Any]]]  # model -> name -> `ChatParameters.changed`


def _read(value: Any) -> UserPresets:
    """Check the structure of stored presets; `ChatParameters` checks the values when one is applied."""
    if not isinstance(value, dict) or not all(isinstance(names, dict) for names in value.values()):
        raise ValueError("expected an object of models, each an object of presets")
    for model, names in value.items():
        for name, changed in names.items():
            if not isinstance(changed, dict):
                raise ValueError(f"{one_line(f'{model}, {name}', 80)}: expected an object of parameters")
    return {model: dict(names) for model, names in value.items()}


SECTION: Final = Section[UserPresets]("presets", dict, _read)


class Presets:
    """The presets of all models; the user's are stored in the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def own(self, model: str) -> list[str]:
        """Names of the user's presets for a model, in alphabetical order."""
        return sorted(self._of(model), key=str.casefold)

    def offered(self, model: str) -> dict[str, str]:
        """All presets for a model with a short description: the defaults, the user's, then the built-in ones."""
        own = dict.fromkeys(self.own(model), "yours")
        return {MODEL_DEFAULTS: "", **own, **{name: DESCRIPTIONS[name] for name in PRESETS if name not in own}}

    def values(self, model: str, name: str, parameters: ChatParameters) -> Mapping[str, Any]:
        """The value of `ChatParameters.changed` with a preset.

        Raises:
            ParameterError: there is no preset with this name.
        """
        if name == MODEL_DEFAULTS:
            return {}
        own = self._of(model).get(name)
        return own if own is not None else parameters.with_preset(name)

    def apply(self, model: str, name: str, parameters: ChatParameters) -> None:
        """Set the parameters to a preset.

        Raises:
            ParameterError: there is no preset with this name, or it has a value that is not allowed.
        """
        try:
            parameters.load(self.values(model, name, parameters))
        except ParameterError as error:
            if name in self._of(model):
                raise ParameterError(f"the preset {name} cannot be used: {error}") from error
            raise

    def matching(self, model: str, parameters: ChatParameters) -> str | None:
        """The preset with the current values; None = there is none."""
        return next((n for n in self.offered(model) if self.values(model, n, parameters) == parameters.changed), None)

    def save(self, model: str, name: str, parameters: ChatParameters) -> str:
        """Save the current values as a preset, replacing the user's preset with this name; returns the cleaned name.

        Raises:
            ParameterError: the name is empty, too long, or a built-in preset's.
            MachineError: the settings cannot be written.
        """
        name = " ".join(printable(name).split())
        if not name:
            raise ParameterError("preset: enter a name")
        if len(name) > MAX_NAME:
            raise ParameterError(f"preset: use a name of at most {MAX_NAME} characters")
        if name in (MODEL_DEFAULTS, *PRESETS):
            raise ParameterError(f"preset: {name} is a built-in preset: choose another name")

        def add(own: UserPresets) -> UserPresets:
            return {**own, model: {**own.get(model, {}), name: dict(parameters.changed)}}

        self._settings.change(SECTION, add)
        return name

    def delete(self, model: str, name: str) -> None:
        """Delete one of the user's presets.

        Raises:
            ParameterError: the user has no preset with this name.
            MachineError: the settings cannot be written.
        """
        if name not in self._of(model):
            raise ParameterError(f"preset: {name or 'this'} is not one of your presets: only those can be deleted")

        def remove(own: UserPresets) -> UserPresets:
            left = {**own, model: {each: own[model][each] for each in own.get(model, {}) if each != name}}
            return {each: names for each, names in left.items() if names}

        self._settings.change(SECTION, remove)

    def _of(self, model: str) -> dict[str, dict[str, Any]]:
        return self._settings.get(SECTION).get(model, {})
