"""What all commands share: how errors end them. Knows nothing of what any command does."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable

from llm_edge.runtime.errors import LlmEdgeError

_INPUT = 2
_MACHINE = 3
_INTERRUPTED = 130
_CLOSED_PIPE = 141  # as a shell counts SIGPIPE
_MACHINE_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # a path that cannot be one


def run(command: Callable[[], object]) -> int:
    """Run a command and return its exit code, as `errors` lists them.

    0 done, 2 bad usage or input, 3 the machine failed, 130 interrupted (SIGTERM and SIGHUP count as Ctrl-C, so that a
    command cleans up), 141 the reader of its output has gone. An error on purpose, a full disk or memory and Ctrl-C
    become one line on stderr; anything else is a defect of ours and keeps its traceback.
    """
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, signal.default_int_handler)
    try:
        command()
        sys.stdout.flush()  # a reader that has gone shows here, not at the interpreter's end
    except LlmEdgeError as error:
        _tell(str(error))
        return error.exit_code
    except MemoryError:
        _tell("not enough memory")
        return _MACHINE
    except BrokenPipeError:  # the reader of our output has gone: not worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except OSError as error:
        if error.errno not in (*_MACHINE_ERRORS, *_NAME_ERRORS):
            raise
        _tell(f"{error.filename or 'disk'}: {error.strerror}")
        return _MACHINE if error.errno in _MACHINE_ERRORS else _INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _tell(message: str) -> None:
    """Print one line that cannot steer a terminal: a message may quote names out of a stranger's file."""
    print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
