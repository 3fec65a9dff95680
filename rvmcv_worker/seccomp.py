"""The system calls that no child may make, as a program of classic BPF for the kernel's seccomp filter.

Written here and not by a library: libseccomp's bindings are not on PyPI, what is there (`pyseccomp`) has
not been kept since 2021 and wants a `libseccomp.so.2` that a container need not have, and without the
filter there would be no wall. The program is a straight list, a few instructions for each call; tests run
it and compare the numbers with libseccomp's where that is installed.

It is a list of what is refused: torch, OpenMP, OpenVINO and the CUDA driver make too many calls, each
release others, for a list of what is allowed. Calls newer than those that were looked at do not exist for
a child (`ENOSYS`, for which the C library has an answer).
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from dataclasses import dataclass

#: An instruction: operation, how many to skip if true and if false, operand.
Instruction = tuple[int, int, int, int]

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
#: Where `struct seccomp_data` has the call's number and its ABI; arguments follow at 16, 8 bytes each. Of
#: those, the lower half is looked at (both machines are little-endian): the kernel takes no more of them.
_NUMBER, _ABI, _ARGUMENTS = 0, 4, 16

#: The newest call that was looked at: file_setattr, of Linux 6.17.
_LAST_KNOWN = 469
#: An x86-64 call with this bit set is one of x32.
_X32_BIT = 0x40000000

#: Refused whatever their arguments are: name, number on x86-64, number on aarch64.
_REFUSED: tuple[tuple[str, int | None, int | None], ...] = (
    # other processes' memory, descriptors and secrets
    ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270),
    ("process_vm_writev", 311, 271),
    ("process_madvise", 440, 440),
    ("process_mrelease", 448, 448),
    ("pidfd_getfd", 438, 438),
    ("kcmp", 312, 272),
    ("migrate_pages", 256, 238),
    ("add_key", 248, 217),
    ("request_key", 249, 218),
    ("keyctl", 250, 219),
    # file systems and namespaces
    ("mount", 165, 40),
    ("umount2", 166, 39),
    ("pivot_root", 155, 41),
    ("chroot", 161, 51),
    ("open_tree", 428, 428),
    ("open_tree_attr", 467, 467),
    ("move_mount", 429, 429),
    ("fsopen", 430, 430),
    ("fsconfig", 431, 431),
    ("fsmount", 432, 432),
    ("fspick", 433, 433),
    ("mount_setattr", 442, 442),
    ("unshare", 272, 97),
    ("setns", 308, 268),
    ("name_to_handle_at", 303, 264),
    ("open_by_handle_at", 304, 265),
    ("fanotify_init", 300, 262),
    ("quotactl", 179, 60),
    ("quotactl_fd", 443, 443),
    # objects that outlive their maker, whose memory counts as no process's, and which without a wall all of a
    # user's processes share; multiprocessing and torch take files in /dev/shm instead
    ("shmget", 29, 194),
    ("shmat", 30, 196),
    ("shmctl", 31, 195),
    ("semget", 64, 190),
    ("semop", 65, 193),
    ("semctl", 66, 191),
    ("semtimedop", 220, 192),
    ("msgget", 68, 186),
    ("msgsnd", 69, 189),
    ("msgrcv", 70, 188),
    ("msgctl", 71, 187),
    ("mq_open", 240, 180),
    ("mq_unlink", 241, 181),
    # much of the kernel for few users of it
    ("io_setup", 206, 0),  # of which the whole machine has 65,536
    ("io_uring_setup", 425, 425),
    ("io_uring_enter", 426, 426),
    ("io_uring_register", 427, 427),
    ("bpf", 321, 280),
    ("userfaultfd", 323, 282),
    ("perf_event_open", 298, 241),
    ("memfd_secret", 447, 447),
    ("modify_ldt", 154, None),
    ("uselib", 134, None),
    ("_sysctl", 156, None),
    ("sysfs", 139, None),
    ("ustat", 136, None),
    ("lookup_dcookie", 212, 18),
    ("nfsservctl", 180, 42),
    # the machine itself
    ("init_module", 175, 105),
    ("finit_module", 313, 273),
    ("delete_module", 176, 106),
    ("create_module", 174, None),
    ("kexec_load", 246, 104),
    ("kexec_file_load", 320, 294),
    ("reboot", 169, 142),
    ("syslog", 103, 116),
    ("acct", 163, 89),
    ("vhangup", 153, 58),
    ("swapon", 167, 224),
    ("swapoff", 168, 225),
    ("settimeofday", 164, 170),
    ("clock_settime", 227, 112),
    ("iopl", 172, None),
    ("ioperm", 173, None),
)
#: Those whose arguments decide.
_JUDGED: tuple[tuple[str, int | None, int | None], ...] = (
    ("socket", 41, 198),
    ("socketpair", 53, 199),
    ("clone", 56, 220),
    ("clone3", 435, 435),
    ("ioctl", 16, 29),
    ("personality", 135, 92),
    ("fcntl", 72, 25),
    ("prlimit64", 302, 261),
)
#: What these say when refused, for callers that then have another way; all others say EPERM.
_ERRORS = dict.fromkeys(("io_setup", "io_uring_setup", "io_uring_enter", "io_uring_register"), errno.ENOSYS)

#: The flags of clone(2) that make a namespace: of users, mounts, cgroups, UTS, IPC, PIDs, the network.
_NEW_NAMESPACE = 0x7E020000
#: The flag of clone(2) that makes a child of one's parent, which is the daemon where there is no wall.
_OF_MY_PARENT = 0x8000
#: Commands of fcntl(2) by which whoever opens a file waits for its lease's holder: F_SETLEASE.
_LEASES = (0x400,)
#: Whose limits may be read and changed: one's own. Without a wall the daemon's could be, down to no CPU time.
_OWN_LIMITS = (0,)
#: Requests of ioctl(2) that type into a terminal, paste into a console, or load a line discipline.
_TERMINAL_REQUESTS = (0x5412, 0x541C, 0x5423)
#: What personality(2) may be asked for: the usual one, and which one it is.
_PERSONALITIES = (0, 0xFFFFFFFF)
_SOCKET_TYPE_MASK = 0xF  # without SOCK_CLOEXEC and SOCK_NONBLOCK
_NETLINK_ROUTE = 0


@dataclass(frozen=True)
class Machine:
    """What the filter must know of a processor."""

    #: As the kernel's audit system numbers it.
    abi: int
    #: Which column of the tables is its own.
    column: int
    has_x32: bool = False

    @property
    def refused(self) -> dict[str, int]:
        """Numbers of the calls that are refused."""
        return self._numbers(_REFUSED)

    @property
    def judged(self) -> dict[str, int]:
        """Numbers of the calls whose arguments decide."""
        return self._numbers(_JUDGED)

    def _numbers(self, table: tuple[tuple[str, int | None, int | None], ...]) -> dict[str, int]:
        return {row[0]: number for row in table if (number := row[1:][self.column]) is not None}


MACHINES = {
    "x86_64": Machine(abi=0xC000003E, column=0, has_x32=True),
    "aarch64": Machine(abi=0xC00000B7, column=1),
}


class UnknownMachineError(Exception):
    """There is no filter for this processor; the message says for which there is."""


def program(machine: str = "", *, internet: bool = True) -> bytes:
    """Return the filter as an array of `struct sock_filter`, for `machine` or the one that this is.

    Without `internet` there are no sockets of IPv4 and IPv6 at all: for where no namespace keeps the
    network away. Raises `UnknownMachineError`.
    """
    name = machine or platform.machine()
    if name not in MACHINES:
        raise UnknownMachineError(f"there is no seccomp filter for {name}, only for {', '.join(MACHINES)}")
    instructions = _instructions(MACHINES[name], internet=internet)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


def _instructions(machine: Machine, *, internet: bool) -> list[Instruction]:
    # A program for another ABI has other numbers for the same calls: it is killed, not misjudged.
    code = [_load(_ABI), (_EQUAL, 1, 0, machine.abi), _give(_KILL), _load(_NUMBER)]
    if machine.has_x32:
        code += [(_AT_LEAST, 0, 1, _X32_BIT), _give(_KILL)]
    code += [(_AT_LEAST, 0, 1, _LAST_KNOWN + 1), _refuse(errno.ENOSYS)]
    for name, number in machine.refused.items():
        code += _call(number, [_refuse(_ERRORS.get(name, errno.EPERM))])
    socket_rules = _socket(internet=internet)
    rules = {
        "socket": socket_rules,
        "socketpair": socket_rules,
        # Where the flags of `clone3` lie a filter cannot look: with ENOSYS the C library takes `clone`.
        "clone3": [_refuse(errno.ENOSYS)],
        "clone": [
            _load_argument(0),
            (_ANY_BIT, 0, 1, _NEW_NAMESPACE | _OF_MY_PARENT),
            _refuse(errno.EPERM),
            _give(_ALLOW),
        ],
        "ioctl": [_load_argument(1), *_none_of(_TERMINAL_REQUESTS, errno.EPERM), _give(_ALLOW)],
        "personality": [_load_argument(0), *_one_of(_PERSONALITIES, errno.EPERM), _give(_ALLOW)],
        "fcntl": [_load_argument(1), *_none_of(_LEASES, errno.EPERM), _give(_ALLOW)],
        "prlimit64": [_load_argument(0), *_one_of(_OWN_LIMITS, errno.EPERM), _give(_ALLOW)],
    }
    for name, number in machine.judged.items():
        code += _call(number, rules[name])
    return [*code, _give(_ALLOW)]


def _socket(*, internet: bool) -> list[Instruction]:
    """Allow sockets of UNIX, TCP, UDP and routing news.

    One of vsock, Bluetooth, SCTP, DCCP or netfilter is a way out, or to much of the kernel, down to loading
    modules, and no job has a use for it.
    """
    judge_internet = [
        _load_argument(1),
        (_AND, 0, 0, _SOCKET_TYPE_MASK),
        *_one_of((socket.SOCK_STREAM, socket.SOCK_DGRAM), errno.ESOCKTNOSUPPORT),
        _load_argument(2),
        *_one_of((0, socket.IPPROTO_TCP, socket.IPPROTO_UDP), errno.EPROTONOSUPPORT),
        _give(_ALLOW),
    ]
    judge_netlink = [
        _load_argument(2),
        *_one_of((_NETLINK_ROUTE,), errno.EPROTONOSUPPORT),
        _give(_ALLOW),
    ]
    code = [_load_argument(0), *_call(socket.AF_UNIX, [_give(_ALLOW)])]
    code += _call(socket.AF_NETLINK, judge_netlink)
    for family in (socket.AF_INET, socket.AF_INET6) if internet else ():
        code += _call(family, judge_internet)
    return [*code, _refuse(errno.EAFNOSUPPORT)]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _load_argument(index: int) -> Instruction:
    return _load(_ARGUMENTS + 8 * index)


def _give(verdict: int) -> Instruction:
    return (_RETURN, 0, 0, verdict)


def _refuse(error: int) -> Instruction:
    return _give(_ERRNO | error)


def _call(value: int, then: list[Instruction]) -> list[Instruction]:
    """Run `then`, which must end in a verdict, where what is loaded equals `value`; else skip it."""
    return [(_EQUAL, 0, len(then), value), *then]


def _one_of(values: tuple[int, ...], error: int) -> list[Instruction]:
    """Refuse with `error` whatever is none of `values`."""
    checks = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [*checks, _refuse(error)]


def _none_of(values: tuple[int, ...], error: int) -> list[Instruction]:
    """Refuse with `error` whatever is one of `values`."""
    return [step for value in values for step in _call(value, [_refuse(error)])]
