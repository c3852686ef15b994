"""What all commands share: how errors end them. Knows nothing of what any command does."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from llm_edge.runtime.errors import LlmEdgeError

_MACHINE = 3
_INTERRUPTED = 130


def run(command: Callable[[], object]) -> int:
    """Run a command and return its exit code, as `errors` lists them.

    0 done, 2 bad usage or input, 3 the machine failed, 130 interrupted. An error on purpose, a full disk or memory
    and Ctrl-C become one line on stderr; anything else is a defect of ours and keeps its traceback.
    """
    try:
        command()
    except LlmEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("error: not enough memory", file=sys.stderr)
        return _MACHINE
    except BrokenPipeError:  # the reader of our output has gone: not worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT):
            print(f"error: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
            return _MACHINE
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
