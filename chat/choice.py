"""What can be chosen to answer, and who answers then. Knows no widgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_edge.chat import bundles
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class BundleChoice:
    """A bundle on this machine, in a precision; None takes the bundle's preferred one. `draft`: see `Model.load`."""

    path: Path
    precision: str | None = None
    provider: str = "auto"
    threads: int | None = None
    draft: Path | None = None


Choice = BundleChoice | Endpoint


def open_responder(choice: Choice) -> Responder:
    """Load what was chosen; takes its time.

    Raises:
        LlmEdgeError: it cannot be loaded, or reached.
    """
    if isinstance(choice, Endpoint):
        return EndpointResponder(choice)
    if choice.path == bundles.DEFAULT and not choice.path.exists():
        raise InputError(f"{choice.path} is not there yet: make it here, or choose another model")
    return LocalResponder(choice.path, choice.precision, choice.provider, choice.threads, choice.draft)


def remember(choice: Choice, settings: Settings) -> None:
    """Offer it again the next time.

    Raises:
        MachineError: that cannot be kept.
    """
    if isinstance(choice, Endpoint):
        endpoint.used(settings, choice)
    else:
        bundles.used(settings, choice.path)


def called(choice: Choice) -> str:
    """A choice in a few words."""
    if isinstance(choice, Endpoint):
        return f"{choice.model} at {choice.host}"
    return f"{choice.path.name}, {choice.precision}" if choice.precision else choice.path.name


def is_of(choice: Choice, responder: Responder | None) -> bool:
    """Whether this is who answers now."""
    if isinstance(choice, Endpoint):
        return isinstance(responder, EndpointResponder) and responder.endpoint == choice
    if not isinstance(responder, LocalResponder):
        return False
    same = responder.path.absolute() == choice.path.absolute()
    return same and choice.precision in (None, responder.detail)
