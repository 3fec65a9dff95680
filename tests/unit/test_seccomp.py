"""What the filter answers to each call, run as the kernel runs it, for processors that this need not be."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import pytest

from rvmcv_worker import seccomp

X86_64, AARCH64 = seccomp.MACHINES["x86_64"], seccomp.MACHINES["aarch64"]
BOTH = pytest.mark.parametrize("name", ["x86_64", "aarch64"])
NEW_USER, THREAD = 0x10000000, 0x3D0F00
I386, ARM = 0x40000003, 0x40000028


def run(program: bytes, abi: int, number: int, *arguments: int) -> str:
    """Interpret classic BPF; returns "allow", "kill" or the name of an error."""
    words = [argument & (1 << 64) - 1 for argument in (*arguments, *[0] * 6)[:6]]
    data = struct.pack("<IIQ6Q", number, abi, 0, *words)
    code = list(struct.iter_unpack("<HBBI", program))
    at = held = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            held = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x54:
            held &= value
        elif operation == 0x06:
            break
        else:
            true = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[operation]
            at += if_true if true else if_false
    if value >> 16 == 0x5:
        return errno.errorcode[value & 0xFFFF]
    return {0x7FFF0000: "allow", 0x80000000: "kill"}[value]


def ask(name: str, call: str, *arguments: int, internet: bool = True) -> str:
    machine = seccomp.MACHINES[name]
    return run(seccomp.program(name, internet=internet), machine.abi, machine.judged[call], *arguments)


@BOTH
def test_each_listed_call_is_refused_whatever_its_arguments(name: str) -> None:
    machine, program = seccomp.MACHINES[name], seccomp.program(name)
    for call, number in machine.refused.items():
        wanted = "ENOSYS" if call.startswith("io_") else "EPERM"
        for arguments in ((), (0xFFFFFFFFFFFFFFFF,) * 6):
            assert run(program, machine.abi, number, *arguments) == wanted, call


@BOTH
def test_all_others_are_let_through_but_none_that_is_not_known_yet(name: str) -> None:
    machine, program = seccomp.MACHINES[name], seccomp.program(name)
    listed = {*machine.refused.values(), *machine.judged.values()}
    answers = {number: run(program, machine.abi, number) for number in range(600) if number not in listed}
    assert {number for number, answer in answers.items() if answer == "allow"} == set(range(470)) - listed
    assert {answers[number] for number in range(470, 600)} == {"ENOSYS"}


def test_calls_of_another_abi_are_the_end() -> None:
    for machine, name, foreign in ((X86_64, "x86_64", I386), (AARCH64, "aarch64", ARM)):
        program = seccomp.program(name)
        assert run(program, foreign, 1) == "kill"
        assert run(program, machine.abi, 1) == "allow"
    x32_read = 0x40000000
    assert run(seccomp.program("x86_64"), X86_64.abi, x32_read) == "kill"
    assert run(seccomp.program("aarch64"), AARCH64.abi, x32_read) == "ENOSYS"


@BOTH
def test_processes_and_threads_but_no_namespaces(name: str) -> None:
    assert ask(name, "clone", THREAD) == "allow"
    for flag in (NEW_USER, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000):
        assert ask(name, "clone", THREAD | flag) == "EPERM"
    assert ask(name, "clone", 0x8000 | 17) == "EPERM"  # CLONE_PARENT
    assert ask(name, "clone", 1 << 63 | THREAD) == "allow"  # the kernel drops the upper half
    assert ask(name, "clone3", 0x1000, 88) == "ENOSYS"


@BOTH
@pytest.mark.parametrize("call", ["socket", "socketpair"])
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((1, 1, 0), "allow"),  # UNIX
        ((1, 5, 0), "allow"),
        ((2, 1, 0), "allow"),  # INET
        ((2, 1 | 0o2004000, 6), "allow"),  # SOCK_CLOEXEC | SOCK_NONBLOCK
        ((10, 2, 17), "allow"),
        ((2, 3, 1), "ESOCKTNOSUPPORT"),  # raw
        ((2, 5, 0), "ESOCKTNOSUPPORT"),  # SEQPACKET: would load SCTP
        ((2, 1, 132), "EPROTONOSUPPORT"),  # SCTP
        ((2, 1, 262), "EPROTONOSUPPORT"),  # MPTCP
        ((16, 3, 0), "allow"),  # NETLINK_ROUTE
        ((16, 3, 12), "EPROTONOSUPPORT"),  # NETLINK_NETFILTER
        ((40, 1, 0), "EAFNOSUPPORT"),  # VSOCK
        ((17, 3, 0), "EAFNOSUPPORT"),  # PACKET
        ((38, 5, 0), "EAFNOSUPPORT"),  # ALG
        ((0x100000028, 1, 0), "EAFNOSUPPORT"),  # VSOCK with a bit that the kernel drops
        ((0x100000001, 1, 0), "allow"),
    ],
)
def test_sockets(name: str, call: str, arguments: tuple[int, ...], answer: str) -> None:
    assert ask(name, call, *arguments) == answer


@BOTH
def test_without_the_internet(name: str) -> None:
    answers = [ask(name, "socket", family, 1, 0, internet=False) for family in (1, 2, 10, 16)]
    assert answers == ["allow", "EAFNOSUPPORT", "EAFNOSUPPORT", "allow"]


@BOTH
def test_terminals_and_personalities(name: str) -> None:
    assert ask(name, "ioctl", 0, 0x5401) == "allow"  # TCGETS
    for request in (0x5412, 0x541C, 0x5423, 0xDEAD00005412):
        assert ask(name, "ioctl", 0, request) == "EPERM"
    assert [ask(name, "personality", value) for value in (0, 0xFFFFFFFF, 0x40000, 8)] == [
        *("allow", "allow", "EPERM", "EPERM")
    ]


@BOTH
def test_no_leases_and_nobody_elses_limits(name: str) -> None:
    assert ask(name, "fcntl", 3, 1) == "allow"  # F_GETFD
    assert [ask(name, "fcntl", 3, command) for command in (0x400, 1 << 40 | 0x400)] == ["EPERM", "EPERM"]
    assert [ask(name, "prlimit64", pid, 7) for pid in (0, 1, 0xFFFFFFFF)] == ["allow", "EPERM", "EPERM"]


@BOTH
def test_the_numbers_are_those_of_libseccomp(name: str) -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    machine = seccomp.MACHINES[name]
    found = {
        call: library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(machine.abi), os.fsencode(call))
        for call in (*machine.refused, *machine.judged)
    }
    newer_than_the_library = {call for call, number in found.items() if number == -1}
    assert newer_than_the_library <= {"open_tree_attr", "memfd_secret", "process_mrelease", "quotactl_fd"}
    numbers = {**machine.refused, **machine.judged}
    assert {call: number for call, number in found.items() if number != -1} == {
        call: number for call, number in numbers.items() if call not in newer_than_the_library
    }


def test_a_processor_without_a_filter_is_named() -> None:
    with pytest.raises(seccomp.UnknownMachineError, match="for riscv64, only for x86_64, aarch64"):
        seccomp.program("riscv64")
