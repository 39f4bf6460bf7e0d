"""Namespaces of a rule's process: users, processes and network of its own, where Linux allows it.

The process that the scorer started (outside, waits) > init (process 1 inside, reaps) > the rule.
When init ends, the kernel kills everything inside, whatever its session, environment or parent is.
init ends with the rule, and with the process outside, however that ends.

Imports only the standard library, so that rule_child.py starts quickly.
"""

import contextlib
import ctypes
import os
import select
import signal
from collections.abc import Sequence

_NEW_MOUNTS = 0x00020000
_NEW_USER = 0x10000000
_NEW_PROCESSES = 0x20000000
_NEW_NETWORK = 0x40000000
"""CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID and CLONE_NEWNET of linux/sched.h."""
_PRIVATE = 0x4000 | 0x40000
"""MS_REC | MS_PRIVATE of linux/mount.h."""
_NO_SUID_DEV_EXEC = 0x2 | 0x4 | 0x8
_PR_SET_PDEATHSIG = 1
_SIGNALED = 128
"""Exit codes above are signals, as in a shell."""


def enter(*, network: bool, life_fd: int, pipes: Sequence[int]) -> tuple[bool, bool]:
    """Enter a user namespace and a process namespace, and without `network` one for that.

    From a user namespace the environments and the memory of other processes cannot be read, not
    even of the same user's. Returns whether there is one, and whether there is a process namespace:
    then the caller goes on as a process inside, and two others wait for it. Where the kernel or the
    container allows neither, the rule has the rights of its user.

    Args:
        network: keep the network of the machine.
        life_fd: readable as soon as the scorer's process is gone.
        pipes: descriptors that only the rule keeps open.
    """
    libc = ctypes.CDLL(None)
    uid = os.geteuid()
    gid = os.getegid()
    kinds = _NEW_USER | (0 if network else _NEW_NETWORK)
    is_contained = libc.unshare(kinds | _NEW_PROCESSES) == 0
    if not is_contained and libc.unshare(kinds) != 0:
        return False, False
    # Some distributions forbid even this; the process is then shown as the user nobody.
    with contextlib.suppress(OSError):
        for file, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(content)
    if is_contained:
        _continue_inside(libc, life_fd, pipes)
    return True, is_contained


def _continue_inside(libc: ctypes.CDLL, life_fd: int, pipes: Sequence[int]) -> None:
    """Fork init and the rule's process; return in the latter only."""
    init = os.fork()
    if init:
        _wait_and_exit(init, pipes)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([life_fd], [], [], 0)[0]:  # the outer process was killed before this request
        os._exit(1)
    rule = os.fork()
    if rule:
        _wait_and_exit(rule, pipes)
    os.close(life_fd)
    # Its own /proc shows a rule only its own processes. Some containers do not allow it.
    if libc.unshare(_NEW_MOUNTS) == 0 and _mount(libc, b"none", b"/", None, _PRIVATE) == 0:
        _mount(libc, b"proc", b"/proc", b"proc", _NO_SUID_DEV_EXEC)


def _mount(libc: ctypes.CDLL, source: bytes, target: bytes, kind: bytes | None, flags: int) -> int:
    result: int = libc.mount(source, target, kind, ctypes.c_ulong(flags), None)
    return result


def _wait_and_exit(process: int, pipes: Sequence[int]) -> None:
    """Reap children until `process` ends, and exit as it did. Does not return."""
    for pipe in pipes:
        os.close(pipe)
    while True:
        ended, status = os.wait()
        if ended == process:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else _SIGNALED - code)
