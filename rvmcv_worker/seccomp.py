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
from collections.abc import Mapping
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

#: Refused whatever their arguments are, with the same number everywhere.
_REFUSED = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
    **{"mount_setattr": 442, "open_tree_attr": 467},
    **{"pidfd_getfd": 438, "process_madvise": 440, "process_mrelease": 448, "quotactl_fd": 443},
    "memfd_secret": 447,
}
_REFUSED_X86_64 = {
    # other processes' memory, descriptors and secrets
    **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "migrate_pages": 256},
    **{"add_key": 248, "request_key": 249, "keyctl": 250},
    # file systems and namespaces
    **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308},
    **{"name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "quotactl": 179},
    # much of the kernel for few users of it
    **{"bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "modify_ldt": 154, "uselib": 134},
    **{"_sysctl": 156, "sysfs": 139, "ustat": 136, "lookup_dcookie": 212, "nfsservctl": 180},
    # the machine itself
    **{"init_module": 175, "finit_module": 313, "delete_module": 176, "create_module": 174},
    **{"kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "syslog": 103, "acct": 163, "vhangup": 153},
    **{"swapon": 167, "swapoff": 168, "settimeofday": 164, "clock_settime": 227, "iopl": 172, "ioperm": 173},
}
_REFUSED_AARCH64 = {
    **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "migrate_pages": 238},
    **{"add_key": 217, "request_key": 218, "keyctl": 219},
    **{"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268},
    **{"name_to_handle_at": 264, "open_by_handle_at": 265, "fanotify_init": 262, "quotactl": 60},
    **{"bpf": 280, "userfaultfd": 282, "perf_event_open": 241, "lookup_dcookie": 18, "nfsservctl": 42},
    **{"init_module": 105, "finit_module": 273, "delete_module": 106},
    **{"kexec_load": 104, "kexec_file_load": 294, "reboot": 142, "syslog": 116, "acct": 89, "vhangup": 58},
    **{"swapon": 224, "swapoff": 225, "settimeofday": 170, "clock_settime": 112},
}
#: What these say when refused; all others say EPERM. For ENOSYS callers have another way.
_ERRORS = {name: errno.ENOSYS for name in ("io_uring_setup", "io_uring_enter", "io_uring_register")}

#: The flags of clone(2) that make a namespace: of users, mounts, cgroups, UTS, IPC, PIDs, the network.
_NEW_NAMESPACE = 0x7E020000
#: Requests of ioctl(2) that type into a terminal, paste into a console, or load a line discipline.
_TERMINAL_REQUESTS = (0x5412, 0x541C, 0x5423)
#: What personality(2) may be asked for: the usual one, and which one it is.
_PERSONALITIES = (0, 0xFFFFFFFF)
_SOCKET_TYPE_MASK = 0xF  # without SOCK_CLOEXEC and SOCK_NONBLOCK
_NETLINK_ROUTE = 0


@dataclass(frozen=True)
class Machine:
    """What the filter must know of a processor: its ABI as the audit system names it, and numbers of calls."""

    abi: int
    refused: Mapping[str, int]
    #: Those whose arguments decide.
    judged: Mapping[str, int]
    has_x32: bool = False


MACHINES = {
    "x86_64": Machine(
        abi=0xC000003E,
        refused=_REFUSED | _REFUSED_X86_64,
        judged={
            **{"socket": 41, "socketpair": 53, "clone": 56, "clone3": 435, "ioctl": 16, "personality": 135}
        },
        has_x32=True,
    ),
    "aarch64": Machine(
        abi=0xC00000B7,
        refused=_REFUSED | _REFUSED_AARCH64,
        judged={
            **{"socket": 198, "socketpair": 199, "clone": 220, "clone3": 435, "ioctl": 29, "personality": 92}
        },
    ),
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
        "clone": [_load_argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACE), _refuse(errno.EPERM), _give(_ALLOW)],
        "ioctl": [_load_argument(1), *_none_of(_TERMINAL_REQUESTS, errno.EPERM), _give(_ALLOW)],
        "personality": [_load_argument(0), *_one_of(_PERSONALITIES, errno.EPERM), _give(_ALLOW)],
    }
    for name, number in machine.judged.items():
        code += _call(number, rules[name])
    return [*code, _give(_ALLOW)]


def _socket(*, internet: bool) -> list[Instruction]:
    """Allow sockets of UNIX, TCP, UDP and routing news: no vsock, packet or Bluetooth, nor what loads modules.

    An unprivileged socket of SCTP, DCCP or netfilter is a way to much of the kernel that no job has a use for.
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
