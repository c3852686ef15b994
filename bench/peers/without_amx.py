"""Runs a command on a processor without AMX, as laptops have: `python without_amx.py COMMAND …`.

Linux gives a process the tile registers of AMX only when it asks by arch_prctl(ARCH_REQ_XCOMP_PERM)
(https://docs.kernel.org/arch/x86/xstate.html). A seccomp filter answers that request as a kernel without AMX would, for
the command and its children; libraries then use their AVX-512 or AVX2 code. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_AUDIT_ARCH_X86_64 = 0xC000003E
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM, _ARCH_REQ_XCOMP_GUEST_PERM = 0x1023, 0x1025
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: ld [k] as 32 bits, jeq #k, ret #k
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

# (operation, instructions to skip if equal, and if not, operand)
_FILTER = (
    (_LOAD, 0, 0, _ARCH),
    (_JUMP_IF_EQUAL, 0, 5, _AUDIT_ARCH_X86_64),
    (_LOAD, 0, 0, _NUMBER),
    (_JUMP_IF_EQUAL, 0, 3, _SYS_ARCH_PRCTL),
    (_LOAD, 0, 0, _FIRST_ARGUMENT),
    (_JUMP_IF_EQUAL, 2, 0, _ARCH_REQ_XCOMP_PERM),
    (_JUMP_IF_EQUAL, 1, 0, _ARCH_REQ_XCOMP_GUEST_PERM),
    (_RETURN, 0, 0, _ALLOW),
    (_RETURN, 0, 0, _ERRNO | errno.EOPNOTSUPP),
)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def problem() -> str | None:
    """Why this is impossible on this machine, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return f"AMX can be taken away on 64-bit Linux on x86-64 only, not on {platform.system()} {platform.machine()}"
    return None


def refuse_amx() -> None:
    """Disable AMX for this process and its children permanently.

    Raises:
        OSError: the kernel rejects the filter.
    """
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _FILTER)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(_FILTER), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def main(arguments: Sequence[str] | None = None) -> str:
    """Replace this process by the command; returns only if that fails."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    if not command:
        return "error: give a command to run without AMX"
    if (reason := problem()) is not None:
        return f"error: {reason}"
    try:
        refuse_amx()
        os.execvp(command[0], command)  # noqa: S606 - the caller's own command
    except OSError as error:
        return f"error: {command[0]}: {error.strerror}"


if __name__ == "__main__":
    if message := main():
        print(message, file=sys.stderr)
        sys.exit(2)
