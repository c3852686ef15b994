"""Keys of endpoints: where they are, and reading them just before they are used. Writes none to any file.

A place is written `env:NAME` for a variable of the environment, `keyring` for the system's keyring (service
`llm-edge`, the endpoint's base URL as the user name), or nothing where the endpoint wants no key.
"""

from __future__ import annotations

import os
from typing import Any

from llm_edge.runtime.errors import InputError

KEYRING = "keyring"
ENVIRONMENT = "env:"
_SERVICE = "llm-edge"
_LONGEST = 8_192


def read(place: str, url: str) -> str:
    """The key that lies at a place, "" for none.

    Raises:
        InputError: there is none, or it is no key; the message does not show it.
    """
    if not place:
        return ""
    if place.startswith(ENVIRONMENT):
        name = place.removeprefix(ENVIRONMENT)
        where = f"the environment variable {name}"
        key = os.environ.get(name, "").strip()
        if not key:
            raise InputError(f"{where} is not set: set it before the chat starts, or choose another place for the key")
    elif place == KEYRING:
        where = "the keyring"
        key = (_call("get_password", url) or "").strip()
        if not key:
            raise InputError(f"the keyring holds no key for {url}: enter it once more")
    else:
        raise InputError("where the key is: 'env:NAME' or 'keyring' is understood, nothing else")
    return _checked(key, where)


def store(url: str, key: str) -> None:
    """Give a key to the keyring.

    Raises:
        InputError: there is no keyring that keeps secrets, or this is no key.
    """
    _call("set_password", url, _checked(key.strip(), "the key"))


def forget(url: str) -> None:
    """Take a key out of the keyring, if it is there."""
    import keyring.errors

    try:
        _call("delete_password", url)
    except InputError as error:
        if not isinstance(error.__cause__, keyring.errors.PasswordDeleteError):
            raise


def _checked(key: str, where: str) -> str:
    if not key or len(key) > _LONGEST or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where} holds no key: one line of ASCII without spaces was expected")
    return key


def _call(name: str, *arguments: str) -> Any:
    """A function of the keyring.

    Raises:
        InputError: there is none, it is locked, or it would write secrets in the clear.
    """
    import keyring
    import keyring.backend
    import keyring.errors

    remedy = "put the key into an environment variable and name that"
    try:
        backend = keyring.get_keyring()
        for each in getattr(backend, "backends", (backend,)):
            if "plaintext" not in type(each).__name__.lower():
                return getattr(each, name)(_SERVICE, *arguments)
    except keyring.errors.NoKeyringError as error:
        raise InputError(f"this machine has no keyring: {remedy}") from error
    except (keyring.errors.KeyringError, OSError, RuntimeError) as error:
        raise InputError(f"the keyring refused ({type(error).__name__}): unlock it, or {remedy}") from error
    raise InputError(f"the keyring {type(backend).__name__} keeps secrets in the clear: {remedy}")
