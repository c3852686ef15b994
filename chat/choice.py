"""`Choice`: the model to chat with, a bundle on this machine or an endpoint's model, and opening it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_edge.chat import bundles
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.settings import Settings
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
