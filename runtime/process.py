"""`ProcessBound`: objects that work only in the process that created them."""

from __future__ import annotations

import os
from typing import NoReturn

from llm_edge.runtime.errors import ProcessError


class ProcessBound:
    """Base class of what uses threads or memory that neither a fork nor a pickle carries to another process."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def in_own_process(self) -> bool:
        """Whether this is the process that created the object."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raise ProcessError in a forked process."""
        if not self.in_own_process:
            raise ProcessError(
                f"this {type(self).__name__} was created in another process and does not survive a fork: "
                "load the bundle in the process that uses it"
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ProcessError(
            f"a {type(self).__name__} cannot be pickled or copied: pass the bundle's path, and load it where it is used"
        )
