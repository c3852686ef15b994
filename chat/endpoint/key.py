"""API keys of endpoints, which are read from the environment or the keyring and never written to a file.

The place of a key is `env:NAME` for an environment variable, `keyring` for the system's keyring (service `llm-edge`,
the endpoint's base URL as the user name), or "" if the endpoint needs no key.
"""

from __future__ import annotations

import os
from typing import Any

from llm_edge.runtime.errors import InputError
from llm_edge.runtime.installation import install_hint

KEYRING = "keyring"
ENVIRONMENT = "env:"
_SERVICE = "llm-edge"
_MAX_KEY = 8_192  # characters


def read(place: str, url: str) -> str:
    """The key at a place; "" if no key is needed.

    Raises:
        InputError: there is no key, or it is malformed; the message does not contain it.
    """
    if not place:
        return ""
    if place.startswith(ENVIRONMENT):
        name = place.removeprefix(ENVIRONMENT)
        where = f"the environment variable {name}"
        key = os.environ.get(name, "").strip()
        if not key:
            raise InputError(
                f"{where} is not set: set it before starting the chat, or choose another place for the key"
            )
    elif place == KEYRING:
        where = "the keyring"
        key = (_call("get_password", url) or "").strip()
        if not key:
            raise InputError(f"the keyring has no key for {url}: enter it again")
    else:
        raise InputError("the place of the key is unknown: use 'env:NAME' or 'keyring'")
    return _checked(key, where)


def store(url: str, key: str) -> None:
    """Store a key in the keyring.

    Raises:
        InputError: there is no secure keyring, or the key is malformed.
    """
    _call("set_password", url, _checked(key.strip(), "the key"))


def delete(url: str) -> None:
    """Delete a key from the keyring, if it is there."""
    import keyring.errors

    try:
        _call("delete_password", url)
    except InputError as error:
        if not isinstance(error.__cause__, keyring.errors.PasswordDeleteError):
            raise


def _checked(key: str, where: str) -> str:
    if not key or len(key) > _MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where} is not a key: expected one line of ASCII without spaces")
    return key


def _call(name: str, *arguments: str) -> Any:
    """Call a function of the keyring.

    Raises:
        InputError: there is none, it is locked, or it stores secrets unencrypted.
    """
    remedy = "put the key into an environment variable and name that"
    try:
        import keyring
        import keyring.backend
        import keyring.errors
    except ImportError as error:
        raise InputError(f"the keyring needs keyring: {install_hint('tui')}, or {remedy}") from error
    try:
        backend = keyring.get_keyring()
        for each in getattr(backend, "backends", (backend,)):
            if "plaintext" not in type(each).__name__.lower():
                return getattr(each, name)(_SERVICE, *arguments)
    except keyring.errors.NoKeyringError as error:
        raise InputError(f"this machine has no keyring: {remedy}") from error
    except (keyring.errors.KeyringError, OSError, RuntimeError) as error:
        raise InputError(f"the keyring failed ({type(error).__name__}): unlock it, or {remedy}") from error
    raise InputError(f"the keyring {type(backend).__name__} stores secrets unencrypted: {remedy}")
