"""Landlock: which files a process may touch, where bubblewrap cannot hide the others.

https://docs.kernel.org/userspace-api/landlock.html. The kernel must have it (5.13 on) and have it switched
on; what each later version of it adds is used where it is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rvmcv_worker import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1

# linux/landlock.h
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
#: How many rights to files each version knows, from version 1 on: REFER came with 2, TRUNCATE with 3,
#: IOCTL_DEV with 5.
_KNOWN_RIGHTS = (13, 14, 15, 15, 16)
#: The version from which TCP can be refused, and from which abstract sockets and signals to others can.
_NETWORK_SINCE, _SCOPES_SINCE = 4, 6
_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11

#: What may be done in a directory that a child may read, in one of its own, and with a device.
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_WRITING = ((1 << 16) - 1) & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)
_USING = _READ_FILE | _WRITE_FILE | _IOCTL_DEV
#: The rights that a rule for something else than a directory may give.
_OF_FILES = _EXECUTE | _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV


@dataclass(frozen=True)
class Ruleset:
    """What a process may touch; paths that are not there are left out."""

    readable: tuple[str, ...]
    writable: tuple[str, ...]
    devices: tuple[str, ...] = ()
    #: Directories of which names may be listed, and of all beneath, but nothing be read.
    listable: tuple[str, ...] = ()
    #: Whether it may speak TCP; has no effect before version 4.
    tcp: bool = False

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Ruleset:
        """Return the ruleset of which these are the fields."""
        lists = {name: tuple(fields[name]) for name in ("readable", "writable", "devices", "listable")}
        return cls(**lists, tcp=bool(fields["tcp"]))

    def rights(self, version: int) -> dict[str, int]:
        """Return each path with what may be done there, as far as this version of Landlock can tell."""
        found = dict.fromkeys(self.readable, _READING)
        more = (self.listable, _READ_DIR), (self.devices, _USING), (self.writable, _READING | _WRITING)
        for paths, rights in more:
            for path in paths:
                found[path] = found.get(path, 0) | rights
        return {path: rights & _handled(version) for path, rights in found.items()}

    def attributes(self, version: int) -> bytes:
        """Return what is refused unless a rule allows it, as `struct landlock_ruleset_attr`."""
        words = [_handled(version)]
        if version >= _NETWORK_SINCE:
            words.append(0 if self.tcp else _BIND_AND_CONNECT)
        if version >= _SCOPES_SINCE:
            words.append(_ABSTRACT_SOCKETS_AND_SIGNALS)
        return struct.pack(f"={len(words)}Q", *words)


def version() -> int:
    """Return the version of the kernel's Landlock; 0 where there is none, or it is switched off."""
    with contextlib.suppress(OSError):
        return kernel.call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))
    return 0


def restrict(ruleset: Ruleset) -> None:
    """Bind this process, and all that it becomes or starts, to the rules; raises `OSError`.

    It must have forbidden itself new privileges. Nothing undoes it.
    """
    known = version()
    attributes = ruleset.attributes(known)
    size, no_flags = ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    rules = kernel.call(_CREATE_RULESET, ctypes.c_char_p(attributes), size, no_flags)
    try:
        for path, rights in ruleset.rights(known).items():
            with contextlib.suppress(FileNotFoundError):
                _allow(rules, path, rights)
        kernel.call(_RESTRICT_SELF, ctypes.c_int(rules), no_flags)
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        rule = ctypes.c_char_p(struct.pack("=Qi", rights, place))
        kernel.call(_ADD_RULE, ctypes.c_int(rules), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _handled(version: int) -> int:
    return (1 << _KNOWN_RIGHTS[min(version, len(_KNOWN_RIGHTS)) - 1]) - 1
