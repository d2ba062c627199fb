"""A machine without userfaultfd: `python deny.py COMMAND...` runs it under a seccomp filter that refuses the system
call and the ioctl of /dev/userfaultfd, as a container's profile does. Standard library only. `deny_ioctl` refuses
a single ioctl in a process that goes on."""

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
USERFAULTFD_IOC_NEW, UFFDIO_MOVE = 0xAA00, 0xC028AA05
CALLS = {"x86_64": (323, 16), "aarch64": (282, 29)}  # userfaultfd, ioctl
NO_CALL = 0xFFFFFFFF
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_AT, ARGUMENT_1_AT = 0, 24  # in struct seccomp_data
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


def program(refused, request):
    """Refuses a system call, and an ioctl of that request. (instruction, taken if true, taken if false, operand): jumps
    count the instructions to leave out."""
    _, ioctl = CALLS[platform.machine()]
    return [(LOAD, 0, 0, NUMBER_AT),
            (EQUAL, 4, 0, refused),
            (EQUAL, 0, 2, ioctl),
            (LOAD, 0, 0, ARGUMENT_1_AT),
            (EQUAL, 1, 0, request),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, ERRNO | errno.EPERM)]


def deny_userfaultfd():
    """From here on, for this thread and all that it starts, for ever."""
    _filter(program(CALLS[platform.machine()][0], USERFAULTFD_IOC_NEW))


def deny_ioctl(request):
    """The same for ioctls of one request."""
    _filter(program(NO_CALL, request))


def _filter(steps):
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    kept = ctypes.create_string_buffer(code)
    header = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(kept))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    for option, value, argument in ((PR_SET_NO_NEW_PRIVS, 1, None), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)):
        if prctl(option, value, argument, 0, 0):
            raise OSError(ctypes.get_errno(), "no seccomp filter can be had here")


if __name__ == "__main__":
    deny_userfaultfd()
    os.execvp(sys.argv[1], sys.argv[1:])
