"""Privileges, and what of the kernel a job has no need for."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import signal
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.attacks.attack import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    attack,
    first_reached,
    others,
    reached_by,
    read,
    syscall,
    written,
)


@attack("become root by a setuid program", by="ordinary", needs="su")
def _setuid(_: dict[str, Any]) -> str:
    read, write = os.pipe()
    with subprocess.Popen(["su"], stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as su:
        try:
            end = time.monotonic() + 0.5
            while time.monotonic() < end and su.poll() is None:
                for line in Path(f"/proc/{su.pid}/status").read_text().splitlines():
                    if line.startswith("Uid:") and line.split()[2] == "0":
                        return line
        finally:
            os.close(write)
            su.kill()
    return ""


@attack("become root by setuid()", by="root")
def _set_user(_: dict[str, Any]) -> str:
    os.setresuid(0, 0, 0)
    return "uid 0"


@attack("hold a capability", by="root")
def _capabilities(_: dict[str, Any]) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return " ".join(line for line in lines if line.startswith("Cap") and int(line.split()[1], 16))


@attack("make a user namespace by unshare", needs="user namespaces")
def _unshare(_: dict[str, Any]) -> str:
    syscall(272, ctypes.c_long(CLONE_NEWUSER))
    return "a namespace"


@attack("make a user namespace by clone", needs="user namespaces")
def _clone(_: dict[str, Any]) -> str:
    if syscall(56, ctypes.c_long(CLONE_NEWUSER | signal.SIGCHLD), None, None, None, None) == 0:
        os._exit(0)
    return "a namespace"


@attack("make a process by clone3, whose flags no filter sees", needs="clone3")
def _clone3(_: dict[str, Any]) -> str:
    arguments = struct.pack("11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    if syscall(435, arguments, ctypes.c_size_t(len(arguments))) == 0:
        os._exit(0)
    return "a process"


@attack("mount in a namespace of its own", needs="user namespaces")
def _mount(_: dict[str, Any]) -> str:
    try:
        syscall(272, ctypes.c_long(CLONE_NEWUSER | CLONE_NEWNS))
    except OSError:
        if os.getuid() != 0:
            raise
    syscall(165, b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
    return "/tmp"


@attack("enter the daemon's namespaces", by="root")
def _setns(targets: dict[str, Any]) -> str:
    def enter(pid: str) -> str:
        for kind in ("net", "mnt", "pid", "user"):
            try:
                syscall(308, os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)
            except OSError:
                continue
            return kind
        return ""

    return first_reached([str(pid) for pid in others(targets)], enter)


@attack("leave by chroot", by="root")
def _chroot(targets: dict[str, Any]) -> str:
    os.chroot(targets["own"])
    return "chroot"


@attack("read the disk by a device of its own", by="root", needs="a disk below the work directory")
def _mknod(targets: dict[str, Any]) -> str:
    device = f"{targets['own']}/device"
    os.mknod(device, stat.S_IFBLK | 0o600, os.stat(targets["own"]).st_dev)
    return f"{len(read(device))} characters of the disk"


@attack("open a device", needs="a device that anybody may open")
def _devices(_: dict[str, Any]) -> str:
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "stdout", "stderr"}
    names = {
        "mem",
        "kmem",
        "kmsg",
        "fuse",
        "kvm",
        "vhost-vsock",
        "vhost-net",
        "vsock",
        "loop-control",
        "port",
    }
    names |= {"input", "uinput", "net/tun", "userfaultfd", "dri/card0", "udmabuf"}
    try:
        names |= {name for name in os.listdir("/dev") if name.startswith(("vd", "sd", "nvme", "loop"))}
    except OSError:
        pass
    opened = []
    for name in sorted(names - harmless):
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        opened.append(name)
    return " ".join(opened)


@attack("change the kernel's settings", by="root")
def _kernel_settings(_: dict[str, Any]) -> str:
    return first_reached(
        [
            "/proc/sys/kernel/core_pattern",
            "/proc/sys/kernel/modprobe",
            "/proc/sys/vm/overcommit_memory",
            "/proc/sysrq-trigger",
            "/proc/irq/default_smp_affinity",
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "/sys/fs/cgroup/cgroup.procs",
            "/sys/power/state",
        ],
        written,
    )


@attack("read the kernel's memory and tables in /proc", by="root")
def _kernel_tables(_: dict[str, Any]) -> str:
    def opened(path: str) -> str:
        return path if read(path) else ""

    closed = [path for path in Path("/proc").iterdir() if path.is_file() and not path.stat().st_mode & 0o004]
    closed += [Path("/proc/kcore"), Path("/proc/kmsg"), Path("/proc/kpageflags")]  # perhaps covered
    return " ".join(filter(None, (reached_by(opened, str(path)) for path in closed)))


@attack("read the kernel's log", needs="kernel.dmesg_restrict = 0")
def _kernel_log(_: dict[str, Any]) -> str:
    buffer = ctypes.create_string_buffer(1000)
    length = syscall(103, 3, buffer, 1000)
    return buffer.raw[:length].decode(errors="replace")[:60] or "an empty log"


@attack("set up io_uring", needs="a kernel with io_uring")
def _io_uring(_: dict[str, Any]) -> str:
    return f"descriptor {syscall(425, 8, ctypes.create_string_buffer(120))}"


@attack("set up io_uring by the call of 32-bit programs", needs="io_uring, and 32-bit calls")
def _io_uring_32(_: dict[str, Any]) -> str:
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the code is that of x86")
    low = 0x40  # MAP_32BIT: such a program sees no more of an address
    code = mmap.mmap(
        -1,
        4096,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | low,
        prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
    )
    start = ctypes.addressof(ctypes.c_char.from_buffer(code))
    # push rbx; mov ebx, 8; mov ecx, start + 2048; mov eax, 425; int 0x80; pop rbx; ret
    program = b"\x53\xbb" + struct.pack("I", 8) + b"\xb9" + struct.pack("I", start + 2048)
    code.write(program + b"\xb8" + struct.pack("I", 425) + b"\xcd\x80\x5b\xc3")
    result = ctypes.CFUNCTYPE(ctypes.c_int)(start)()
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return f"descriptor {result}"


@attack("handle page faults of its own (userfaultfd)", needs="a kernel with userfaultfd")
def _userfaultfd(_: dict[str, Any]) -> str:
    user_mode_only = 1
    return f"descriptor {syscall(323, ctypes.c_long(user_mode_only))}"


@attack("load a program into the kernel (bpf)", by="root", needs="a kernel with bpf")
def _bpf(_: dict[str, Any]) -> str:
    array = struct.pack("5I", 2, 4, 4, 1, 0) + bytes(100)
    return f"descriptor {syscall(321, 0, array, ctypes.c_uint(len(array)))}"


@attack("count what the machine does (perf_event_open)", needs="kernel.perf_event_paranoid below 3")
def _perf(_: dict[str, Any]) -> str:
    software, user_only = 1, (1 << 5) | (1 << 6)
    attributes = struct.pack("IIQQQQQ", software, 112, 0, 0, 0, 0, user_only) + bytes(64)
    return f"descriptor {syscall(298, attributes, 0, -1, -1, ctypes.c_ulong(0))}"


@attack("keep a key in the kernel", needs="kernel keyrings")
def _add_key(_: dict[str, Any]) -> str:
    process_keyring = -2
    return f"key {syscall(248, b'user', b'hostile', b'x', ctypes.c_size_t(1), process_keyring)}"


@attack("load a kernel module", by="root", needs="a kernel with modules")
def _module(_: dict[str, Any]) -> str:
    try:
        syscall(175, b"not a module", ctypes.c_ulong(12), b"")
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    return "the kernel has read it"
