"""Named values of parameters: the runtime's own for every model, and a person's for each. Knows no widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.settings import Section, Settings
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.presets import DESCRIPTIONS, PRESETS

MODELS_OWN: Final = "model's own"
LONGEST_NAME: Final = 40  # characters

Own = dict[str, dict[str, dict[str, Any]]]  # by model, by name: `ChatParameters.changed`


def _read(value: Any) -> Own:
    """Presets as they stand in the file; their values are looked at by `ChatParameters` when they are used."""
    if not isinstance(value, dict) or not all(isinstance(names, dict) for names in value.values()):
        raise ValueError("an object of models, each an object of presets, was expected")
    for model, names in value.items():
        for name, changed in names.items():
            if not isinstance(changed, dict):
                raise ValueError(f"{one_line(f'{model}, {name}', 80)}: an object of parameters was expected")
    return {model: dict(names) for model, names in value.items()}


SECTION: Final = Section[Own]("presets", dict, _read, dict)


class Presets:
    """See the module.

    Args:
        settings: where a person's own are kept.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def own(self, model: str) -> list[str]:
        """Names of a person's own for this model, in alphabetical order."""
        return sorted(self._of(model), key=str.casefold)

    def offered(self, model: str) -> dict[str, str]:
        """All for this model: name -> a line on what it is for. First the model's own values, then a person's own."""
        own = dict.fromkeys(self.own(model), "yours")
        return {MODELS_OWN: "", **own, **{name: DESCRIPTIONS[name] for name in PRESETS if name not in own}}

    def values(self, model: str, name: str, parameters: ChatParameters) -> Mapping[str, Any]:
        """What `ChatParameters.changed` is with a preset.

        Raises:
            ParameterError: there is none of this name.
        """
        if name == MODELS_OWN:
            return {}
        own = self._of(model).get(name)
        return own if own is not None else parameters.with_preset(name)

    def use(self, model: str, name: str, parameters: ChatParameters) -> None:
        """Turn the parameters to a preset.

        Raises:
            ParameterError: there is none of this name, or it holds what a parameter cannot be.
        """
        try:
            parameters.load(self.values(model, name, parameters))
        except ParameterError as error:
            if name in self._of(model):
                raise ParameterError(f"the preset {name} cannot be used: {error}") from error
            raise

    def matching(self, model: str, parameters: ChatParameters) -> str | None:
        """Which preset has the values of now, if one has."""
        return next((n for n in self.offered(model) if self.values(model, n, parameters) == parameters.changed), None)

    def save(self, model: str, name: str, parameters: ChatParameters) -> str:
        """Keep the values of now; a preset of a person's own of this name is replaced. Returns the name.

        Raises:
            ParameterError: the name is none that can be had.
            MachineError: the settings cannot be written.
        """
        name = " ".join(printable(name).split())
        if not name:
            raise ParameterError("preset: give it a name")
        if len(name) > LONGEST_NAME:
            raise ParameterError(f"preset: a name has {LONGEST_NAME} characters at most")
        if name in (MODELS_OWN, *PRESETS):
            raise ParameterError(f"preset: {name} is there already for all models: choose another name")

        def add(own: Own) -> Own:
            return {**own, model: {**own.get(model, {}), name: dict(parameters.changed)}}

        self._settings.change(SECTION, add)
        return name

    def delete(self, model: str, name: str) -> None:
        """Forget a person's own.

        Raises:
            ParameterError: it is none of these.
            MachineError: the settings cannot be written.
        """
        if name not in self._of(model):
            raise ParameterError(f"preset: {name or 'this'} is not one of yours: only those can be deleted")

        def remove(own: Own) -> Own:
            left = {**own, model: {each: own[model][each] for each in own.get(model, {}) if each != name}}
            return {each: names for each, names in left.items() if names}

        self._settings.change(SECTION, remove)

    def _of(self, model: str) -> dict[str, dict[str, Any]]:
        return self._settings.get(SECTION).get(model, {})
