"""The errors that llm-edge raises.

    LlmEdgeError                    exit 1    base class, never raised itself
    ├── InputError                  exit 2    unusable input; the message names it and the remedy
    │   ├── CheckpointError                   a checkpoint, its config or its tokenizer
    │   │   └── UnsupportedArchitectureError  a model that our own decoder does not compute
    │   │       ├── UnknownFamilyError        its `model_type` is none of ours
    │   │       └── UnsupportedSettingError   a setting of its config, or a tensor, is not supported
    │   ├── BundleError                       a bundle folder: missing, damaged, of another format version
    │   ├── TemplateError                     a chat template, or a conversation it rejects
    │   ├── ParameterError                    a sampling or loading parameter out of range
    │   ├── ContextLengthError                a prompt longer than the model's context
    │   ├── LogitsError                       a step computed logits that are not finite
    │   └── ProviderError                     the requested execution provider is not available
    ├── BusyError                   exit 1    too many requests are waiting in an engine
    ├── ParityError                 exit 1    an exported graph does not compute what the reference computes
    ├── WorseError                  exit 1    a fine-tuned bundle has a higher loss than the model before training
    ├── ProcessError                exit 1    a model used in another process than the one that loaded it
    └── MachineError                exit 3    the machine failed: disk, memory
        └── StepTerminatedError               a step exceeded `step_seconds`, or its result was no longer wanted

A message is one line: the file or field, the reason, the remedy.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path


class LlmEdgeError(Exception):
    """Base class of all errors; `exit_code` is the exit code of a command that fails with it."""

    exit_code = 1


class InputError(LlmEdgeError):
    """The caller's input cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint, its config or its tokenizer is missing, damaged or unknown."""


class UnsupportedArchitectureError(CheckpointError):
    """A model that our own decoder does not compute; the export may still do so through transformers.

    Attributes:
        path: the Hugging Face folder or GGUF file of the model; None for other sources.
    """

    path: Path | None = None


class UnknownFamilyError(UnsupportedArchitectureError):
    """A model's `model_type` is none of ours."""


class UnsupportedSettingError(UnsupportedArchitectureError):
    """A model is of one of our families, but with a setting or a tensor that is not supported."""


class BundleError(InputError):
    """A bundle folder is missing, damaged or of an unsupported format version."""


class TemplateError(InputError):
    """A chat template failed, was stopped by the sandbox, or rejects the conversation."""


class ParameterError(InputError):
    """A sampling or loading parameter is out of range."""


class ContextLengthError(InputError):
    """A prompt does not fit the model's context; `prompt_tokens` and `limit` are numbers of tokens.

    `at_least`: the prompt was too long to be encoded, so `prompt_tokens` is a lower bound.
    """

    def __init__(self, prompt_tokens: int, limit: int, *, at_least: bool = False) -> None:
        count = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(f"the prompt has {count} tokens, but the model's context holds {limit}: shorten the prompt")
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.at_least = at_least


class LogitsError(InputError):
    """A step computed NaN or no finite logit: the weights are damaged, or they overflowed."""


class ParityError(LlmEdgeError):
    """An exported graph does not compute what the reference computes, so no bundle was written."""


class WorseError(LlmEdgeError):
    """A fine-tuned bundle has a higher loss than the model before training; it is kept next to the trained model."""


class MachineError(LlmEdgeError):
    """The machine failed: disk full, out of memory, no write permission."""

    exit_code = 3


class StepTerminatedError(MachineError):
    """A step was terminated because it exceeded `step_seconds` or its result was no longer wanted."""


class ProcessError(LlmEdgeError):
    """A model, an engine or a generation was used in another process than the one that loaded it."""


class ProviderError(InputError):
    """The requested execution provider is not available."""


class BusyError(LlmEdgeError):
    """An engine's queue is full; `waiting` is the number of waiting requests."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again later")
        self.waiting = waiting


_ORT_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
# Where in its source the library failed: file:line, then perhaps a function's signature.
_SOURCE_LINE = re.compile(
    r"\S+\.(?:cc|cpp|h|hpp|cu):\d+ "
    r"(?:.*\[with [^\]]*\] ?|[^()]*(?:operator\(\))?[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)? ?)?"
)


def native_reason(error: BaseException) -> str:
    """The message of a C++ library's error as `one_line`, without places in its source."""
    try:
        text = _SOURCE_LINE.sub("", _ORT_PREFIX.sub("", " ".join(str(error).split())))
    except Exception:  # noqa: BLE001 (as in `one_line`)
        return type(error).__name__
    return text.strip()[:300] or type(error).__name__


def as_llm_edge_error(error: BaseException, what: str = "generation failed unexpectedly") -> LlmEdgeError:
    """An LlmEdgeError unchanged; anything else, as a MachineError that says what failed and why in one line."""
    if isinstance(error, LlmEdgeError):
        return error
    reason = "not enough memory" if isinstance(error, MemoryError) else one_line(error) or type(error).__name__
    found = MachineError(f"{what} ({reason})")
    found.__cause__ = error
    return found


def is_library_failure(error: BaseException) -> bool:
    """Whether a library failed, rather than a signal or the interpreter's end: Rust's panics are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def typed_errors(what: str = "generation failed unexpectedly") -> Iterator[None]:
    """Turn failures of libraries in the body into LlmEdgeErrors; see `as_llm_edge_error`."""
    try:
        yield
    except LlmEdgeError:
        raise
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise as_llm_edge_error(error, what) from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line of limited length."""
    try:
        return " ".join(str(error).split())[:300]
    except Exception:  # noqa: BLE001 (an error of another library may fail to describe itself)
        return type(error).__name__
