"""The errors that llm-edge raises.

    LlmEdgeError                    exit 1    base class, never raised itself
    ├── InputError                  exit 2    unusable input; the message names it and the remedy
    │   ├── CheckpointError                   a checkpoint, its config or its tokenizer
    │   ├── BundleError                       a bundle folder: missing, damaged, of another format version
    │   ├── TemplateError                     a chat template, or a conversation it rejects
    │   ├── ParameterError                    a sampling or loading parameter out of range
    │   ├── ContextLengthError                a prompt longer than the model's context
    │   └── ProviderError                     the requested execution provider is not available
    ├── BusyError                   exit 1    too many requests are waiting in an engine
    ├── LogitsError                 exit 1    a step computed logits that are not finite
    ├── ParityError                 exit 1    an exported graph does not compute what the reference computes
    └── MachineError                exit 3    the machine failed: disk, memory

A message is one line: the file or field, the reason, the remedy.
"""

from __future__ import annotations


class LlmEdgeError(Exception):
    """Base class of all errors; `exit_code` is the exit code of a command that fails with it."""

    exit_code = 1


class InputError(LlmEdgeError):
    """The caller's input cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint, its config or its tokenizer is missing, damaged or unknown."""


class BundleError(InputError):
    """A bundle folder is missing, damaged or of an unsupported format version."""


class TemplateError(InputError):
    """A chat template failed, was stopped by the sandbox, or rejects the conversation."""


class ParameterError(InputError):
    """A sampling or loading parameter is out of range."""


class ContextLengthError(InputError):
    """A prompt does not fit the model's context; `prompt_tokens` and `limit` are numbers of tokens."""

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {limit}: shorten the prompt"
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class LogitsError(LlmEdgeError):
    """A step computed NaN or no finite logit: the weights are damaged, or they overflowed."""


class ParityError(LlmEdgeError):
    """An exported graph does not compute what the reference computes, so no bundle was written."""


class MachineError(LlmEdgeError):
    """The machine failed: disk full, out of memory, no write permission."""

    exit_code = 3


class ProviderError(InputError):
    """The requested execution provider is not available."""


class BusyError(LlmEdgeError):
    """An engine's queue is full; `waiting` is the number of waiting requests."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again later")
        self.waiting = waiting
