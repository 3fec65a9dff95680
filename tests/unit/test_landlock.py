"""Which rights a path gets, by what the kernel's Landlock knows."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path

import pytest

from rvmcv_worker import landlock, mounts
from rvmcv_worker.landlock import Ruleset
from rvmcv_worker.workspace import Workspace

RULESET = Ruleset(readable=("/usr",), writable=("/own",), devices=("/dev/null",), listable=("/opt",))
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_REG, MAKE_BLOCK = 1 << 6, 1 << 8, 1 << 11
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7, 99])
def test_each_path_has_the_rights_that_it_needs(version: int) -> None:
    rights = RULESET.rights(version)
    assert rights["/usr"] == EXECUTE | READ_FILE | READ_DIR
    assert rights["/opt"] == READ_DIR
    assert rights["/own"] & (WRITE_FILE | READ_FILE | MAKE_REG) == WRITE_FILE | READ_FILE | MAKE_REG
    assert not rights["/own"] & (MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    assert bool(rights["/own"] & REFER) == (version >= 2)
    assert bool(rights["/own"] & TRUNCATE) == (version >= 3)
    assert bool(rights["/dev/null"] & IOCTL_DEV) == (version >= 5)
    handled = struct.unpack_from("=Q", RULESET.attributes(version))[0]
    assert all(right & ~handled == 0 for right in rights.values())  # else the kernel takes none of it


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, [0x1FFF]), (2, [0x3FFF]), (3, [0x7FFF]), (4, [0x7FFF, 3]), (5, [0xFFFF, 3]), (6, [0xFFFF, 3, 3])],
)
def test_what_is_refused_by_version(version: int, words: list[int]) -> None:
    assert list(struct.unpack(f"={len(words)}Q", RULESET.attributes(version))) == words


def test_several_gpus_may_speak_tcp() -> None:
    several = Ruleset(readable=(), writable=(), tcp=True)
    assert struct.unpack("=3Q", several.attributes(6)) == (0xFFFF, 0, 3)


def test_a_ruleset_gets_through_a_pipe() -> None:
    assert Ruleset.parse(json.loads(json.dumps(asdict(RULESET)))) == RULESET


def test_a_job_has_its_own_directory_and_no_other(tmp_path: Path) -> None:
    place = Workspace(tmp_path, "job", 1)
    found = mounts.ruleset(place, "train", ("prepare",), [Path("/venv")], (1,), tcp=False)
    assert str(place.child_dir("train")) in found.writable
    assert {str(place.root / "in"), str(place.root / "prepare"), "/venv"} <= set(found.readable)
    assert not {str(place.root), str(place.out_dir), "/etc", "/", "/home"} & {
        *found.readable,
        *found.writable,
    }
    assert {"/dev/nvidia1", "/dev/nvidiactl"} <= set(found.devices)
    assert "/dev/nvidia0" not in found.devices


def test_the_version_is_a_number_or_nothing() -> None:
    assert landlock.version() >= 0
