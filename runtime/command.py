"""`run`: the exit codes and error messages of every command; `with_options`: options declared by a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from llm_edge.runtime.errors import LlmEdgeError, one_line
from llm_edge.runtime.installation import version

_INPUT = 2
_MACHINE = 3
_INTERRUPTED = 130
_CLOSED_PIPE = 141  # as shells report SIGPIPE
_MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT),
    *(errno.ENOMEM, errno.EFBIG, errno.EAGAIN, errno.EMFILE, errno.ENFILE),  # the limits of ulimit
)
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # impossible paths


def run(command: Callable[[], object], *, native_output: bool = False) -> int:
    """Run a command and return its exit code; see `errors.py`.

    0 success, 2 bad usage or input, 3 the machine failed, 130 interrupted (SIGTERM and SIGHUP act like Ctrl-C, so that
    a command cleans up), 141 broken pipe. An `LlmEdgeError`, a full disk or memory, a limit of the process and Ctrl-C
    print one line to stderr; anything else is a bug and keeps its traceback.

    What native libraries print to stderr is hidden, also in processes that the command starts, unless `native_output`
    is true or the environment variable LLM_EDGE_DEBUG is set.
    """
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, signal.default_int_handler)
    hidden = contextlib.nullcontext() if native_output or os.environ.get("LLM_EDGE_DEBUG") else _native_output_hidden()
    with hidden:
        return _exit_code(command)


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
    except LlmEdgeError as error:
        _print_error(str(error))
        return error.exit_code
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NAME_ERRORS:
            _print_error(f"{error.filename}: {error.strerror}")
            return _INPUT
        reason = machine_failure(error)
        if reason is None:
            raise
        _print_error(reason)
        return _MACHINE
    return 0


def machine_failure(error: BaseException) -> str | None:
    """One line about a failure of the machine, such as full memory or disk; None for a bug."""
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return f"{error.filename or 'disk'}: {error.strerror}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no further thread can be started: raise the limits on memory (ulimit -v) and processes (ulimit -u)"
    library = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError)
    if library and not (getattr(error, "name", None) or "").startswith("llm_edge"):
        while isinstance(error.__cause__ or error.__context__, ImportError):  # numpy's advice is two pages long
            error = error.__cause__ or error.__context__ or error
        return f"a library cannot be loaded ({one_line(error)}): free memory, or install llm-edge again"
    cause: BaseException | None = error  # libraries wrap a lack of memory in errors of their own
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "not enough memory"
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def _native_output_hidden() -> Iterator[None]:
    """Within the block, file descriptor 2 is the null device, and only Python writes to the real stderr.

    Rust prints panics and C++ prints warnings there before they become exceptions.
    """
    before = sys.stderr, sys.__stderr__
    try:
        if before[0].fileno() != 2:  # in a test, or redirected by the caller
            raise OSError
        real = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
    except (AttributeError, OSError, ValueError):  # None, closed, or no file
        yield
        return
    before[0].flush()
    with open(real, "w", buffering=1, encoding=before[0].encoding, errors=before[0].errors) as stream:  # noqa: PTH123
        os.dup2(null, 2)
        os.close(null)
        sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]
        try:
            yield
        finally:
            stream.flush()
            os.dup2(real, 2)
            sys.stderr, sys.__stderr__ = before  # type: ignore[misc]


def with_options(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command one command-line option per field of a dataclass, in place of its parameter `options`.

    Each field is annotated with its `typer.Option`. Those of the dataclass itself come before inherited ones.
    """
    inherited = {name for base in options.__mro__[1:] for name in inspect.get_annotations(base)}
    fields = sorted(dataclasses.fields(options), key=lambda field: field.name in inherited)
    hints = get_type_hints(options, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY

    def default(field: dataclasses.Field[Any]) -> Any:
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name == "options":
                parameters += [
                    inspect.Parameter(field.name, keyword, default=default(field), annotation=hints[field.name])
                    for field in fields
                ]
            else:
                parameters.append(parameter.replace(kind=keyword))

        def wrapped(**values: Any) -> None:
            command(options=options(**{field.name: values.pop(field.name) for field in fields}), **values)

        wrapped.__doc__ = command.__doc__
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def given_on_command_line(context: Any, name: str) -> bool:
    """Whether the user gave an option of a typer command, rather than it having its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def print_version(wanted: bool) -> None:
    """Print the version and exit: the callback of `--version`."""
    if wanted:
        print(f"llm-edge {version()}")
        raise SystemExit(0)


def _print_error(message: str) -> None:
    """Print one line without control characters: a message may quote untrusted names."""
    print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
