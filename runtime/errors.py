"""Every error llm-edge raises on purpose. This module knows nothing of models, files or terminals.

    LlmEdgeError                    exit 1    never raised itself
    ├── InputError                  exit 2    what was given cannot be used; the message names it and the remedy
    │   ├── CheckpointError                   a checkpoint, its config or its tokenizer
    │   ├── BundleError                       a bundle folder: missing, damaged, of another format version
    │   ├── TemplateError                     a chat template, or a conversation it refuses
    │   ├── ParameterError                    a sampling or load parameter out of its range
    │   ├── ContextLengthError                a prompt longer than the model's context
    │   └── ProviderError                     an execution provider that was asked for is not there
    ├── BusyError                   exit 1    an engine has too many requests waiting
    ├── LogitsError                 exit 1    a step yielded logits that are not numbers
    ├── ParityError                 exit 1    an exported graph does not compute what the reference computes
    └── MachineError                exit 3    the machine failed us: disk, memory

Messages are one line: the file or field, the reason, the remedy.
"""

from __future__ import annotations


class LlmEdgeError(Exception):
    """Root of the tree in this module's docstring; `exit_code` is what a command returns for it."""

    exit_code = 1


class InputError(LlmEdgeError):
    """What the caller gave cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint, its config or its tokenizer is missing, damaged or unknown."""


class BundleError(InputError):
    """A bundle folder is missing, damaged or of a format version this runtime does not read."""


class TemplateError(InputError):
    """A chat template failed, was refused by the sandbox, or refuses the conversation."""


class ParameterError(InputError):
    """A sampling or load parameter is out of its range."""


class ContextLengthError(InputError):
    """A prompt does not fit the model's context; `prompt_tokens` and `limit` count tokens."""

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the model's context holds {limit}: shorten the prompt"
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class LogitsError(LlmEdgeError):
    """A step yielded NaN, or no finite logit to draw from: the weights are damaged, or they overflowed."""


class ParityError(LlmEdgeError):
    """An exported graph does not compute what the reference computes, so no bundle was written."""


class MachineError(LlmEdgeError):
    """The machine failed us: no room on disk, no memory, no permission to write."""

    exit_code = 3


class ProviderError(InputError):
    """An execution provider that was asked for is not available here."""


class BusyError(LlmEdgeError):
    """An engine has as many requests waiting as it takes; `waiting` counts them. Try again later."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again later")
        self.waiting = waiting
