"""`run`: the exit codes and error messages of every command."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.installation import version

_INPUT = 2
_MACHINE = 3
_INTERRUPTED = 130
_CLOSED_PIPE = 141  # as shells report SIGPIPE
_MACHINE_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # impossible paths


def run(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; see `errors.py`.

    0 success, 2 bad usage or input, 3 the machine failed, 130 interrupted (SIGTERM and SIGHUP act like Ctrl-C, so that
    a command cleans up), 141 broken pipe. An `LlmEdgeError`, a full disk or memory and Ctrl-C print one line to stderr;
    anything else is a bug and keeps its traceback.
    """
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, signal.default_int_handler)
    try:
        command()
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
    except LlmEdgeError as error:
        _print_error(str(error))
        return error.exit_code
    except MemoryError:
        _print_error("not enough memory")
        return _MACHINE
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except OSError as error:
        if error.errno not in (*_MACHINE_ERRORS, *_NAME_ERRORS):
            raise
        _print_error(f"{error.filename or 'disk'}: {error.strerror}")
        return _MACHINE if error.errno in _MACHINE_ERRORS else _INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def print_version(wanted: bool) -> None:
    """Print the version and exit: the callback of `--version`."""
    if wanted:
        print(f"llm-edge {version()}")
        raise SystemExit(0)


def _print_error(message: str) -> None:
    """Print one line without control characters: a message may quote untrusted names."""
    print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
