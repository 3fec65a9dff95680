"""Other jobs' files, and writing where a job may not."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

from tests.attacks.attack import attack, first_reached, read, syscall, written


@attack("read another job's workspace")
def _other_job(targets: dict[str, Any]) -> str:
    return read(targets["other"])


@attack("climb to another job's workspace")
def _climb(targets: dict[str, Any]) -> str:
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    below = f"{targets['other_root_name']}/in/dataset.zip"
    ways = ("..", "/job/..", "in/../..", "/proc/self/cwd/..", f"/proc/self/fd/{here}/..", "/proc/1/cwd/..")
    return first_reached([f"{way}/{below}" for way in ways], read)


@attack("follow a link to another job's workspace")
def _link(targets: dict[str, Any]) -> str:
    link = Path(targets["own"], "link")
    link.symlink_to(targets["other"])
    return read(link)


@attack("make a hard link to the token")
def _hard_link(targets: dict[str, Any]) -> str:
    link = Path(targets["own"], "hard-link")
    os.link(targets["token"], link)
    return read(link)


@attack("read what the daemon has frozen")
def _frozen(_: dict[str, Any]) -> str:
    return first_reached(["out/frozen.pt", "/job/out/frozen.pt"], read)


@attack("change what was fetched")
def _write_in(_: dict[str, Any]) -> str:
    return first_reached(["in", "in/dataset.zip"], written)


@attack("change what was fetched after making it writable")
def _chmod_in(_: dict[str, Any]) -> str:
    os.chmod("in/dataset.zip", 0o777)
    return "in/dataset.zip"


@attack("hold up whoever opens a file (a lease)")
def _lease(targets: dict[str, Any]) -> str:
    reached = ""
    for path in ("in/dataset.zip", f"{targets['own']}/leased"):
        fd = os.open(path, os.O_RDONLY | (0 if path.startswith("in/") else os.O_CREAT), 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            reached = f"a lease of {path}"
        except OSError:
            continue
        finally:
            os.close(fd)
    return reached


@attack("move what was fetched away")
def _rename_in(_: dict[str, Any]) -> str:
    os.rename("in", "in-of-old")
    os.rename("in-of-old", "in")
    return "in"


@attack("change what an earlier child made")
def _write_earlier(_: dict[str, Any]) -> str:
    return first_reached(["prepare", "prepare/data.yaml"], written)


@attack("write beside its own directory")
def _write_beside(targets: dict[str, Any]) -> str:
    return first_reached([".", "out", "..", str(Path(targets["other"]).parent)], written)


@attack("change the system that the next job uses", by="root")
def _write_system(_: dict[str, Any]) -> str:
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return first_reached([*packages, os.__file__, "/usr/lib", "/etc/ld.so.cache", "/etc"], _opened_to_write)


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
    syscall(165, b"none", target, b"", ctypes.c_ulong(remount | bind), None)
    return target.decode()
