"""What the daemon holds, wherever it holds it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import termios
from pathlib import Path
from typing import Any

from tests.attacks.attack import LIBC, attack, first_reached, leads_to_python, others, read, syscall


@attack("read the token's file")
def _token(targets: dict[str, Any]) -> str:
    return read(targets["token"])


@attack("read the configuration")
def _config(targets: dict[str, Any]) -> str:
    return read(targets["config"])


@attack("read /etc/shadow", by="root")
def _shadow(_: dict[str, Any]) -> str:
    return read("/etc/shadow")


@attack("list /etc")
def _etc(_: dict[str, Any]) -> str:
    known = {"passwd", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives"}
    return " ".join(sorted(set(os.listdir("/etc")) - known))[:200]


@attack("list homes and state of the system")
def _homes(_: dict[str, Any]) -> str:
    found = []
    for directory in ("/root", "/home", "/var", "/run", "/srv", "/opt", "/mnt", "/media", "/boot"):
        try:
            found += [f"{directory}/{name}" for name in os.listdir(directory)]
        except OSError:
            continue
    return " ".join(path for path in found if not leads_to_python(path))[:200]


@attack("read the daemon's environment")
def _environment(targets: dict[str, Any]) -> str:
    def canary(path: str) -> str:
        content = Path(path).read_bytes()
        at = content.find(b"canary-")
        return content[at : at + 60].decode() if at >= 0 else ""

    return first_reached([f"/proc/{pid}/environ" for pid in [*others(targets), os.getppid()]], canary)


@attack("read the daemon's memory", needs="kernel.yama.ptrace_scope = 0, or root")
def _memory(targets: dict[str, Any]) -> str:
    def at_address(path: str) -> str:
        with open(path, "rb", buffering=0) as memory:
            memory.seek(int(targets["address"]))
            return memory.read(40).decode()

    return first_reached([f"/proc/{pid}/mem" for pid in others(targets)], at_address)


@attack("copy the daemon's memory with process_vm_readv", needs="kernel.yama.ptrace_scope = 0, or root")
def _process_vm_readv(targets: dict[str, Any]) -> str:
    buffer = ctypes.create_string_buffer(40)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 40)
    remote = (ctypes.c_size_t * 2)(int(targets["address"]), 40)

    def copy(pid: str) -> str:
        syscall(310, int(pid), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
        return buffer.value.decode()

    return first_reached([str(pid) for pid in others(targets)], copy)


@attack("read the daemon's memory map")
def _maps(targets: dict[str, Any]) -> str:
    def with_address(path: str) -> str:
        for line in Path(path).read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= targets["address"] < end:
                return line
        return ""

    return first_reached([f"/proc/{pid}/maps" for pid in others(targets)], with_address)


@attack("open the daemon's files by /proc/PID/fd")
def _proc_fd(targets: dict[str, Any]) -> str:
    paths = []
    for pid in others(targets):
        try:
            paths += [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
    return first_reached(paths, lambda path: read(path) if Path(path).is_file() else "")


@attack("go through /proc/PID/root and /proc/PID/cwd")
def _proc_root(targets: dict[str, Any]) -> str:
    found = []
    for pid in [*others(targets), os.getpid(), os.getppid()]:
        found += [f"/proc/{pid}/root{targets['token']}", f"/proc/{pid}/cwd/{targets['token_from_daemon']}"]
    return first_reached(found, read)


@attack("see the daemon's command line")
def _command_line(targets: dict[str, Any]) -> str:
    def shown(path: str) -> str:
        content = Path(path).read_bytes()
        return content.replace(b"\0", b" ").decode() if targets["daemon_name"].encode() in content else ""

    return first_reached([f"/proc/{pid}/cmdline" for pid in others(targets)], shown)


@attack("open the token by its file handle", by="root", needs="a file system with file handles")
def _file_handle(targets: dict[str, Any]) -> str:
    kind, content = targets["handle"]
    data = bytes.fromhex(content)
    handle = struct.pack("Ii", len(data), kind) + data
    mount = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    return read(f"/proc/self/fd/{syscall(304, mount, handle, os.O_RDONLY)}")


@attack("read the daemon's keys from its keyring", needs="kernel keyrings")
def _keyring(targets: dict[str, Any]) -> str:
    search, read, session = 10, 11, -3
    key = syscall(250, search, session, b"user", targets["key"].encode(), 0)
    buffer = ctypes.create_string_buffer(100)
    syscall(250, read, key, buffer, 100)
    return buffer.value.decode()


@attack("read the daemon's shared memory (System V)")
def _system_v(targets: dict[str, Any]) -> str:
    LIBC.shmat.restype = ctypes.c_void_p
    number = syscall(29, targets["system_v_key"], ctypes.c_size_t(0), 0)
    address = LIBC.shmat(number, None, 0)
    return ctypes.string_at(address, 40).decode()


@attack("read what lies in /dev/shm")
def _dev_shm(_: dict[str, Any]) -> str:
    return first_reached([f"/dev/shm/{name}" for name in os.listdir("/dev/shm")], _canary)


def _canary(path: str) -> str:
    content = read(path)
    return content if content.startswith("canary-") else ""


@attack("read what lies in /tmp")
def _tmp(targets: dict[str, Any]) -> str:
    return read(targets["in_tmp"])


@attack("use descriptors that it has inherited")
def _inherited(targets: dict[str, Any]) -> str:
    own = {0, 1, 2, targets["progress_fd"], targets["answer_fd"]}
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in own:
            try:
                found[name] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:  # that of the listing itself
                continue
    return " ".join(found.values())


@attack("type into the daemon's terminal", needs="a kernel with TIOCSTI")
def _terminal(_: dict[str, Any]) -> str:
    def push(path: str) -> str:
        terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        for character in b"id\n":
            fcntl.ioctl(terminal, termios.TIOCSTI, bytes([character]))
        return "typed: id"

    return first_reached(["/dev/tty", *(f"/proc/self/fd/{fd}" for fd in (0, 1, 2))], push)
