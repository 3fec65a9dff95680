"""A Debian root by debootstrap: made once, kept in the user's cache, copied for every boot."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

RELEASE = "bookworm"
#: What a freshly installed server has, and what `install.sh` would have apt bring: boots are offline.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "python3-minimal",
    "python3-venv",
    "bubblewrap",
    "util-linux",
    "iproute2",
    "ca-certificates",
    "procps",
)
_TIMEOUT_S = 600.0
#: Program -> the package that has it.
_PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}


class RootMissingError(Exception):
    """No system can be booted here; the message says why and what to do."""


def cache_dir() -> Path:
    """Return where what takes long to make is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rvmcv-worker"


def cached() -> Path:
    """Return the root, made if it is not there; it must never be changed or booted itself."""
    if os.geteuid() != 0:
        raise RootMissingError("booting a system takes root: run the tests as root")
    if missing := sorted({package for program, package in _PROGRAMS.items() if not shutil.which(program)}):
        raise RootMissingError(f"not installed: sudo apt install {' '.join(missing)}")
    key = hashlib.sha256(" ".join((RELEASE, *PACKAGES)).encode()).hexdigest()[:12]
    root = cache_dir() / f"{RELEASE}-{key}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as directory:
            made = Path(directory) / "root"
            _make(made)
            with contextlib.suppress(OSError):  # another run was faster, and made the same
                made.rename(root)
    return root


def copy(root: Path, target: Path) -> Path:
    """Copy a root to `target`, which must not be there yet."""
    subprocess.run(["cp", "-a", "--reflink=auto", root, target], check=True)
    return target


def _make(target: Path) -> None:
    mirror = _mirror()
    try:
        with urllib.request.urlopen(f"{mirror}/dists/{RELEASE}/InRelease", timeout=20) as answer:
            answer.read()
    except OSError as error:
        raise RootMissingError(f"{mirror} cannot be reached, once, for debootstrap: {error}") from None
    argv = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, target, mirror]
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"debootstrap ended with {done.returncode}:\n{done.stdout[-2000:]}")
    # So that the journal of a boot can be read after the next.
    (target / "var/log/journal").mkdir(exist_ok=True)


def _mirror() -> str:
    """Return the mirror that this machine's apt has of the release, or that the environment names."""
    if named := os.environ.get("RVMCV_DEBIAN_MIRROR"):
        return named.rstrip("/")
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    with contextlib.suppress(OSError):
        listed = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
        for line in listed.stdout.splitlines():
            uri, *of = line.split(" ")
            if of == [RELEASE, "main"]:
                return uri.rstrip("/")
    raise RootMissingError(f"apt has no mirror of Debian's {RELEASE} here: name one by RVMCV_DEBIAN_MIRROR")
