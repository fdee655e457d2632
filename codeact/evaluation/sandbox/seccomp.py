"""A filter of system calls for the sandbox: a second wall behind the namespaces.

It denies new processes (threads are allowed: they share the memory limit, processes would each have their own),
sockets, what has been a way out of containers, and kernel memory that no limit of a process counts: System V, memfd,
extended attributes, socket buffers, inotify's queues, records of file locks, whole huge pages that a byte in a pipe
holds (vmsplice). What else is of that kind has a limit: files by the inodes of /tmp, pipes and epoll by open files,
timers and queued signals by RLIMIT_SIGPENDING.
The filter is classic BPF (man 2 seccomp), 8 bytes an instruction: u16 code, u8 jump if true, u8 if false, u32 operand.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h. The latter's are the same on
# both for everything newer than 424.
_NEWER = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "memfd_secret": 447,
    "setxattrat": 463,
    "open_tree_attr": 467,
}
_X86_64 = {
    "shmget": 29,
    "socket": 41,
    "socketpair": 53,
    "fork": 57,
    "vfork": 58,
    "semget": 64,
    "msgget": 68,
    "ptrace": 101,
    "syslog": 103,
    "pivot_root": 155,
    "chroot": 161,
    "mount": 165,
    "umount2": 166,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "io_setup": 206,
    "mq_open": 240,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "inotify_init": 253,
    "unshare": 272,
    "splice": 275,
    "tee": 276,
    "vmsplice": 278,
    "inotify_init1": 294,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "memfd_create": 319,
    "bpf": 321,
    "userfaultfd": 323,
}
_AARCH64 = {
    "io_setup": 0,
    "setxattr": 5,
    "lsetxattr": 6,
    "fsetxattr": 7,
    "inotify_init1": 26,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "chroot": 51,
    "vmsplice": 75,
    "splice": 76,
    "tee": 77,
    "unshare": 97,
    "syslog": 116,
    "ptrace": 117,
    "mq_open": 180,
    "msgget": 186,
    "semget": 190,
    "shmget": 194,
    "socket": 198,
    "socketpair": 199,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "perf_event_open": 241,
    "fanotify_init": 262,
    "setns": 268,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "memfd_create": 279,
    "bpf": 280,
    "userfaultfd": 282,
}
_CLONE3 = 435
_LOCK_COMMANDS = (6, 7, 37, 38, 1024, 1026)
"""Of fcntl: F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE, F_NOTIFY."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """``arch``: its audit name; ``clone``, ``fcntl``: numbers of calls whose arguments matter; ``denied``: of more."""

    arch: int
    clone: int
    fcntl: int
    denied: Mapping[str, int]


_MACHINES = {
    "x86_64": _Machine(arch=0xC000003E, clone=56, fcntl=72, denied=_X86_64 | _NEWER),
    "aarch64": _Machine(arch=0xC00000B7, clone=220, fcntl=25, denied=_AARCH64 | _NEWER),
}


def seccomp_filter(name: str) -> bytes | None:
    """Return the filter for ``platform.machine()``, as ``bwrap --seccomp`` reads it; None for a machine without one."""
    machine = _MACHINES.get(name)
    if machine is None:
        return None
    denial = _ERRNO | errno.EPERM
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, machine.arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if name == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, denial)]  # a second set of numbers for the same calls
    # The C library then falls back to clone, whose flags a filter can see.
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for number in machine.denied.values():
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denial)]
    program += [(_EQUAL, 0, 4, machine.clone), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _CLONE_THREAD)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, denial)]
    program += [(_EQUAL, 0, 2 * len(_LOCK_COMMANDS) + 1, machine.fcntl), (_LOAD, 0, 0, _SECOND_ARGUMENT)]
    for command in _LOCK_COMMANDS:
        program += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, denial)]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
