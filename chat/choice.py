"""`Choice`: the model to chat with, a bundle on this machine or an endpoint's model, and opening it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_edge.chat import bundles
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import one_line
from llm_edge.runtime.bundle import MANIFEST
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.load_options import LoadOptions


@dataclass(frozen=True, slots=True)
class BundleChoice:
    """A bundle and how to load it."""

    path: Path
    options: LoadOptions = LoadOptions()  # noqa: RUF009 (frozen)


Choice = BundleChoice | Endpoint


def open_responder(choice: Choice) -> Responder:
    """Load a bundle, or connect to an endpoint; may take seconds.

    Raises:
        LlmEdgeError: it cannot be loaded or reached.
    """
    if isinstance(choice, Endpoint):
        return EndpointResponder(choice)
    if choice.path == bundles.DEFAULT and not choice.path.exists():
        raise InputError(f"{choice.path}: not found: export it here, or choose another model")
    from llm_edge.runtime.model import Model  # slow; a front end calls this on a thread

    return LocalResponder(Model.open(choice.path, choice.options))


def known_models(settings: Settings) -> list[tuple[str, Choice]]:
    """The bundles and endpoints that can be chosen by name, with one line for each."""
    found: list[tuple[str, Choice]] = []
    for each in bundles.offers(bundles.recent(settings)):
        if isinstance(each, bundles.Offer):
            choice = BundleChoice(each.path, LoadOptions(each.precision))
            found.append((f"{each.path.name} {each.precision}  {each.megabytes}, {each.fidelity}", choice))
    found += [(f"{each.model}  at {each.host}", each) for each in endpoint.endpoints(settings)]
    return found


def find_choice(name: str, settings: Settings) -> Choice:
    """The model that a typed name means: a bundle's folder or name, with a precision after a space, or an endpoint's.

    Raises:
        InputError: there is no such model.
    """
    path, _, precision = name.strip().rpartition(" ")
    for place, chosen in ((name.strip(), None), (path, precision)):
        for folder in (Path(place), bundles.ARTIFACTS / place, *bundles.recent(settings)):
            if place and folder.name == Path(place).name and (folder / MANIFEST).is_file():
                return BundleChoice(folder, LoadOptions(chosen))
    for each in endpoint.endpoints(settings):
        if name.strip() in (each.model, called(each)):
            return each
    raise InputError(f"{one_line(name, 80)}: no such model: name a bundle's folder, or an endpoint's model used before")


def remember(choice: Choice, settings: Settings) -> None:
    """Add a choice to those that were used before.

    Raises:
        MachineError: the settings cannot be written.
    """
    if isinstance(choice, Endpoint):
        endpoint.used(settings, choice)
    else:
        bundles.used(settings, choice.path)


def called(choice: Choice) -> str:
    """A short name for a choice."""
    if isinstance(choice, Endpoint):
        return f"{choice.model} at {choice.host}"
    return f"{choice.path.name}, {choice.options.precision}" if choice.options.precision else choice.path.name


def is_of(choice: Choice, responder: Responder | None) -> bool:
    """Whether a choice is the model that answers now."""
    if isinstance(choice, Endpoint):
        return isinstance(responder, EndpointResponder) and responder.endpoint == choice
    if not isinstance(responder, LocalResponder):
        return False
    same = responder.path.absolute() == choice.path.absolute()
    return same and choice.options.precision in (None, responder.detail)
