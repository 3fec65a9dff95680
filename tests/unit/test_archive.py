"""A data set's archive is taken for hostile: rows 19, 20 and 22 of what must not break the worker."""

from __future__ import annotations

import io
import os
import resource
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvmcv_worker.compute.archive import Unpacked, extract
from rvmcv_worker.errors import DatasetInvalidError, DiskQuotaError
from tests.dataset_fixtures import BOX, draw, limits, pack, yolo

PICTURE = draw(1)
FILES = {"set/images/a.jpg": PICTURE, "set/labels/a.txt": BOX, "set/data.yaml": b"names: [a]\n"}


def unpack(archive: Path, **changed: float) -> Unpacked:
    """Unpack beside the archive, and see that nothing was written anywhere else."""
    before = set(archive.parent.rglob("*"))
    target = archive.parent / "deep" / "target"
    target.parent.mkdir(exist_ok=True)
    try:
        return extract(archive, target, limits(**changed), lambda _: None)
    finally:
        after = set(archive.parent.rglob("*")) - before - {target.parent}
        assert all(path == target or target in path.parents for path in after)
        assert not any(path.is_symlink() for path in after)


def written(archive: Path) -> dict[str, bytes]:
    target = archive.parent / "deep" / "target"
    return {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    }


def pack_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_each_kind_unpacks_to_the_same_bytes(tmp_path: Path, mode: str) -> None:
    archive = pack_tar(tmp_path / "dataset", FILES, mode)
    assert unpack(archive).files == tuple(FILES)
    assert written(archive) == FILES


def test_a_zip_unpacks_to_the_same_bytes(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", FILES)
    assert unpack(archive).files == tuple(FILES)
    assert written(archive) == FILES


def test_a_tar_made_by_tar_of_the_current_folder_unpacks(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "case").mkdir()
    archive = tmp_path / "case" / "dataset.tgz"
    subprocess.run(["tar", "-czf", archive, "-C", folder, "."], check=True)
    assert unpack(archive).files == ("images/a.jpg",)


def test_only_images_labels_and_yaml_reach_the_disk(tmp_path: Path) -> None:
    rubbish = {
        "labels/train.cache": b"pickle",
        "images/a.npy": b"pickle",
        "run.py": b"import os",
        "__MACOSX/images/._a.jpg": b"x",
        "images/._a.jpg": b"x",
        ".DS_Store": b"x",
        "Thumbs.db": b"x",
        ".git/x.txt": b"x",
        "more.zip": b"PK",
    }
    archive = pack(tmp_path / "dataset", {"images/a.JPG": PICTURE, **rubbish})
    unpacked = unpack(archive)
    assert set(written(archive)) == {"images/a.JPG"}
    assert unpacked.skipped == {".cache": 1, ".npy": 1, ".py": 1, "hidden": 4, ".db": 1, ".zip": 1}


HOSTILE_NAMES = {
    "../evil.jpg": "'..'",
    "a/../../evil.jpg": "'..'",
    "/etc/evil.jpg": "absolute",
    "//evil.jpg": "absolute",
    "C:/evil.jpg": "absolute",
    "c:evil.jpg": "absolute",
    "a\\..\\evil.jpg": "backslash",
    "a\x1b[31m.jpg": "control character",
    "a\n.jpg": "control character",
    "a" * 252 + ".jpg": "longer",
    "/".join(["d"] * 40) + "/a.jpg": "deeper",
    "/".join(["d" * 200] * 10) + ".jpg": "longer",
}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(("name", "why"), HOSTILE_NAMES.items())
def test_hostile_names_are_refused(tmp_path: Path, kind: str, name: str, why: str) -> None:
    files = {"images/a.jpg": PICTURE, name: PICTURE}
    archive = (pack if kind == "zip" else pack_tar)(tmp_path / "dataset", files)
    with pytest.raises(DatasetInvalidError, match=why) as caught:
        unpack(archive)
    assert caught.value.message.isprintable()
    if kind == "zip":
        assert not written(archive)  # all names come before the first byte


def test_a_nul_hides_nothing(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", {"images/a.jpgX.cache": PICTURE})
    archive.write_bytes(archive.read_bytes().replace(b"a.jpgX", b"a.jpg\0"))
    with pytest.raises(DatasetInvalidError, match="control character"):
        unpack(archive)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ("a/x.jpg", "a/x.jpg", "twice"),
        ("a/x.jpg", "./a//x.jpg", "twice"),
        ("a/x.jpg", "a/X.JPG", "only in case"),
        ("a/x.jpg", "A/y.jpg", "only in case"),
        ("a/caf\u00e9.jpg", "a/cafe\u0301.jpg", "how its letters"),
        ("a/stra\u00dfe.jpg", "a/STRASSE.jpg", "only in case"),
        ("a.jpg", "a.jpg/b.jpg", "file and a folder"),
        ("a.jpg/b.jpg", "a.jpg", "file and a folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_collide_are_refused(tmp_path: Path, kind: str, one: str, other: str, why: str) -> None:
    archive = tmp_path / "dataset"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(one, PICTURE)
            file.writestr(other, PICTURE)
    else:
        with tarfile.open(archive, "w") as tar:
            for name in (one, other):
                member = tarfile.TarInfo(name)
                member.size = len(PICTURE)
                tar.addfile(member, io.BytesIO(PICTURE))
    with pytest.raises(DatasetInvalidError, match=why):
        unpack(archive)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_a_zip_with_a_special_file_is_refused(tmp_path: Path, mode: int) -> None:
    archive = tmp_path / "dataset"
    with zipfile.ZipFile(archive, "w") as file:
        info = zipfile.ZipInfo("images/a.jpg")
        info.external_attr = (mode | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(DatasetInvalidError, match="link, a pipe or a device"):
        unpack(archive)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "plain file"),
        (b"Z", "plain file"),
    ],
)
def test_a_tar_with_a_special_file_is_refused(tmp_path: Path, kind: bytes, why: str) -> None:
    archive = tmp_path / "dataset"
    with tarfile.open(archive, "w") as file:
        member = tarfile.TarInfo("images/a.jpg")
        member.type = kind
        member.linkname = "/etc/passwd"
        file.addfile(member)
    with pytest.raises(DatasetInvalidError, match=why):
        unpack(archive)


def test_a_link_followed_by_a_file_through_it_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "dataset"
    with tarfile.open(archive, "w") as file:
        link = tarfile.TarInfo("images")
        link.type = tarfile.SYMTYPE
        link.linkname = str(tmp_path)
        file.addfile(link)
        member = tarfile.TarInfo("images/evil.jpg")
        member.size = len(PICTURE)
        file.addfile(member, io.BytesIO(PICTURE))
    with pytest.raises(DatasetInvalidError, match="symbolic link"):
        unpack(archive)
    assert not (tmp_path / "evil.jpg").exists()


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    content = bytearray(pack(tmp_path / "dataset", FILES).read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    (tmp_path / "dataset").write_bytes(content)
    with pytest.raises(DatasetInvalidError, match="encrypted"):
        unpack(tmp_path / "dataset")


def test_a_zip_of_another_method_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "dataset", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("images/a.jpg", PICTURE)
    with pytest.raises(DatasetInvalidError, match="method 14"):
        unpack(tmp_path / "dataset")


def test_a_zip_bomb_is_refused_while_it_unpacks(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", {"images/a.bmp": bytes(20_000_000)})
    assert archive.stat().st_size < 100_000
    with pytest.raises(DatasetInvalidError, match="times its own size"):
        unpack(archive)
    assert sum(map(len, written(archive).values())) < 20_000_000


def test_claims_over_the_byte_cap_are_refused_before_a_byte(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", {"images/a.bmp": os.urandom(3_000_000)})
    with pytest.raises(DatasetInvalidError, match="limit of 2000000 bytes"):
        unpack(archive, max_unpacked_bytes=2_000_000)
    assert not written(archive)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_tar_bomb_in_a_file_that_is_skipped_is_refused(tmp_path: Path, kind: str) -> None:
    archive = pack_tar(tmp_path / "dataset", {"x.bin": bytes(20_000_000), **FILES}, f"w:{kind}")
    with pytest.raises(DatasetInvalidError, match="times its own size"):
        unpack(archive)


@pytest.mark.parametrize("claimed", [10, 100_000_000])
def test_a_zip_whose_header_lies_is_refused(tmp_path: Path, claimed: int) -> None:
    content = bytearray(pack(tmp_path / "dataset", {"images/a.bmp": bytes(1000)}).read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, claimed)
    struct.pack_into("<I", content, content.index(b"PK\x03\x04") + 22, claimed)
    (tmp_path / "dataset").write_bytes(content)
    with pytest.raises(DatasetInvalidError, match=r"damaged|header claims"):
        unpack(tmp_path / "dataset")


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """The overlapping zip bomb: many names, one compressed kernel."""
    kernel = zlib.compress(bytes(1_000_000), 9)[2:-4]
    crc = zlib.crc32(bytes(1_000_000))
    local = (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(kernel), 1_000_000, 5, 0)
        + b"0.jpg"
        + kernel
    )
    central = b"".join(
        struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(kernel), 1_000_000, 5, 0, 0, 0, 0, 0, 0
        )
        + f"{index}.jpg".encode()
        for index in range(10)
    )
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 10, 10, len(central), len(local), 0)
    (tmp_path / "dataset").write_bytes(local + central + end)
    with pytest.raises(DatasetInvalidError, match="overlaps"):
        unpack(tmp_path / "dataset")


def test_a_million_entries_are_refused_before_they_become_objects(tmp_path: Path) -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    central = entry * 1_000_000
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)  # lies: one entry
    (tmp_path / "dataset").write_bytes(local + central + end)
    with pytest.raises(DatasetInvalidError, match="more than 5000 entries"):
        unpack(tmp_path / "dataset")


def test_too_many_entries_in_a_tar_are_refused(tmp_path: Path) -> None:
    archive = pack_tar(tmp_path / "dataset", {f"{index}.txt": b"" for index in range(51)})
    with pytest.raises(DatasetInvalidError, match="more than 50 entries"):
        unpack(archive, max_entries=50)


@pytest.mark.parametrize("kind", ["zip", "tar", "gz", "bz2", "xz"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.98])
def test_a_truncated_archive_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    files = {f"images/{index}.jpg": draw(index) for index in range(20)}
    archive = tmp_path / "dataset"
    if kind == "zip":
        pack(archive, files)
    else:
        pack_tar(archive, files, "w" if kind == "tar" else f"w:{kind}")
    content = archive.read_bytes()
    if kind == "tar":
        content = content.rstrip(b"\0")  # the padding to a record says nothing
    archive.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DatasetInvalidError, match="cut off or damaged"):
        unpack(archive)


def test_a_tar_cut_between_two_entries_is_refused(tmp_path: Path) -> None:
    archive = pack_tar(tmp_path / "dataset", {"a.jpg": PICTURE, "b.jpg": PICTURE})
    block = 512 + -(-len(PICTURE) // 512) * 512
    archive.write_bytes(archive.read_bytes()[:block])
    with pytest.raises(DatasetInvalidError, match=r"after 'a\.jpg'"):
        unpack(archive)


def test_a_tar_header_that_wants_the_memory_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type = tarfile.GNUTYPE_LONGNAME
    member.size = 1 << 33
    (tmp_path / "dataset").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DatasetInvalidError, match="cut off or damaged"):
        unpack(tmp_path / "dataset")


def test_a_tar_of_nothing_but_long_names_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type = tarfile.GNUTYPE_LONGNAME
    member.size = 5
    (tmp_path / "dataset").write_bytes((member.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(512, b"\0")) * 2000)
    with pytest.raises(DatasetInvalidError, match="cut off or damaged"):
        unpack(tmp_path / "dataset")


def test_an_archive_in_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", FILES).read_bytes()
    with pytest.raises(DatasetInvalidError, match=r"1 other archive.*unpack it once"):
        unpack(pack(tmp_path / "dataset", {"dataset.zip": inner}))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"error": "no"}', "error message"),
        (b"Rar!\x1a\x07\x00", "RAR"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (bytes(range(156, 256)), "unknown kind"),
        (b"PK\x05\x06" + bytes(18), "no image"),
        (b"\x1f\x8b\x08" + bytes(50), "damaged"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "dataset").write_bytes(content)
    with pytest.raises(DatasetInvalidError, match=what):
        unpack(tmp_path / "dataset")


def test_a_full_disk_is_not_the_archives_fault(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", {"a.bmp": os.urandom(1_000_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(DiskQuotaError):
            unpack(archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_stop_is_heeded_inside_one_large_file(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    calls = 0

    def tick(_: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise StopError

    archive = pack(tmp_path / "dataset", {"a.bmp": os.urandom(4_000_000)})
    with pytest.raises(StopError):
        extract(archive, tmp_path / "target", limits(), tick)
    assert (tmp_path / "target" / "a.bmp").stat().st_size < 4_000_000


def check_end(archive: Path) -> None:
    """Unpack, which ends in files that were told of, or in a refusal that can be shown."""
    try:
        unpacked = unpack(archive)
    except DatasetInvalidError as refusal:
        message = refusal.message
    else:
        message = "unpacked"
        assert set(unpacked.files) == set(written(archive))
    assert message.isprintable()


NAMES = st.one_of(
    st.text(min_size=1, max_size=20),
    st.lists(
        st.sampled_from(["..", ".", "a", "", "A", "images", "C:", "\\", "x.jpg", "x.txt"]), min_size=1
    ).map("/".join),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=6), st.integers(0, 2**32), st.booleans())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_any_zip_ends_in_files_inside_or_in_a_refusal(
    entries: list[tuple[str, bytes]], flips: int, damage: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "dataset"
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in entries:
                try:
                    file.writestr(name, content)
                except (UnicodeEncodeError, IndexError):  # a lone surrogate or no name: no zip can hold it
                    return
        if damage:
            damaged = bytearray(archive.read_bytes())
            damaged[flips % len(damaged)] ^= 1 + flips % 255
            archive.write_bytes(damaged)
        check_end(archive)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=4),
    st.lists(st.integers(0, 2**24), max_size=3),
)
def test_any_tar_ends_in_files_inside_or_in_a_refusal(
    entries: list[tuple[str, bytes]], flips: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "dataset"
        with tarfile.open(archive, "w", encoding="utf-8", errors="surrogateescape") as file:
            for name, content in entries:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                try:
                    file.addfile(member, io.BytesIO(content))
                except UnicodeEncodeError:
                    return
        damaged = bytearray(archive.read_bytes())
        for flip in flips:
            damaged[flip % min(len(damaged), 4096)] ^= 1 + flip % 255
        archive.write_bytes(damaged)
        check_end(archive)


def test_a_zip_entry_without_a_name_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "dataset", {"images/a.jpg": PICTURE, "nameless": b""})
    archive.write_bytes(archive.read_bytes().replace(b"nameless", b"\0ameless"))
    with pytest.raises(DatasetInvalidError, match="has no name"):
        unpack(archive)


def test_unpacking_imports_no_torch() -> None:
    """The prepare child starts in a fraction of a second and holds nothing that it does not need."""
    code = (
        "import sys, rvmcv_worker.compute.datasets;"
        "sys.exit(bool({'torch', 'ultralytics', 'cv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_drawn_set_is_whole(tmp_path: Path) -> None:
    files = yolo(2)
    assert unpack(pack(tmp_path / "dataset", files)).files == tuple(files)
