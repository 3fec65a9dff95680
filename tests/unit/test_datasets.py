"""The prepare child from an archive to a data set that can train, or to a report that says why not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rvmcv_worker.compute.child import Child, StopRequestedError
from rvmcv_worker.compute.datasets import run
from rvmcv_worker.compute.image_header import ImageFacts, inspect_image
from rvmcv_worker.errors import DatasetInvalidError
from rvmcv_worker.framing import Decoder
from tests.dataset_fixtures import BOX, LIMITS, Prepared, draw, pack, pack_folder, yolo

NAMES = {"data.yaml": b"names: [bottle, can]\n"}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path / "job")


def test_a_good_set_is_placed_byte_for_byte_and_reported(prepared: Prepared) -> None:
    files = yolo(5, top="set/")
    pack(prepared.archive, {**files, **NAMES, "set/labels/train.cache": b"pickle"})
    report = prepared.run()
    for split in ("train", "val"):
        assert prepared.images(split) == [f"{split}_{index:03d}.jpg" for index in range(5)]
        for name in prepared.images(split):
            assert (prepared.data / "images" / split / name).read_bytes() == files[
                f"set/images/{split}/{name}"
            ]
            assert (prepared.data / "labels" / split / name).with_suffix(".txt").read_bytes() == BOX
    assert report["splits"]["train"] == {
        "images": 5,
        "labels": 5,
        "instances": 5,
        "background": 0,
        "without_label_file": 0,
        "per_class": {"bottle": 5, "can": 0},
    }
    assert report["leaks"] == {"train/val": {"equal": 0, "near": 0, "examples": []}}
    assert report["layout"] == "train: set/images/train; val: set/images/val"
    assert report["skipped"] == {".cache": 1}
    assert (report["faults"], report["bad_images"], report["bad_fraction"]) == ([], 0, 0.0)
    assert json.loads((prepared.root / "prepare/report.json").read_text()) == report
    assert sorted(path.name for path in (prepared.root / "prepare").iterdir()) == [
        "data",
        "data.yaml",
        "report.json",
    ]
    assert sorted(path.name for path in prepared.data.iterdir()) == ["images", "labels"]


def test_the_data_yaml_is_ours_alone(prepared: Prepared) -> None:
    theirs = (
        b"names: [bottle]\ntrain: images/train\nval: images/val\ndownload: import os; os.abort()\nnc: 1\n"
    )
    pack(prepared.archive, {**yolo(2), "data.yaml": theirs})
    prepared.run()
    assert yaml.safe_load((prepared.root / "prepare/data.yaml").read_text()) == {
        "path": str(prepared.data),
        "train": "images/train",
        "val": "images/val",
        "names": {0: "bottle"},
    }


def test_a_few_bad_images_are_left_out_with_file_and_line(prepared: Prepared) -> None:
    files = {**yolo(20), **NAMES}
    files["labels/train/train_003.txt"] = BOX + b"7 0.5 0.5 0.1 0.1\n"
    files["images/train/train_004.jpg"] = draw(4)[:300]
    files["labels/train/train_005.txt"] = BOX + b"1 0.5 0.5 0 0.1\n"
    del files["labels/train/train_006.txt"]
    files["labels/train/train_007.txt"] = b""
    pack(prepared.archive, files)
    report = prepared.run()
    assert len(prepared.images("train")) == 18
    assert not {"train_003.jpg", "train_004.jpg"} & set(prepared.images("train"))
    assert not (prepared.data / "labels/train/train_003.txt").exists()
    assert (prepared.data / "labels/train/train_005.txt").read_bytes() == BOX
    told = [(fault["file"], fault["line"], fault["code"], fault["effect"]) for fault in report["faults"]]
    assert told == [
        ("labels/train/train_003.txt", 2, "class_out_of_range", "image left out"),
        ("images/train/train_004.jpg", None, "image_damaged", "image left out"),
        ("labels/train/train_005.txt", 2, "zero_size_box", "line left out"),
    ]
    assert "class 7, but 2 classes are named: 0 to 1" in report["faults"][0]["reason"]
    assert (report["bad_images"], report["bad_fraction"]) == (2, 0.05)
    train = report["splits"]["train"]
    assert (train["images"], train["labels"], train["background"], train["without_label_file"]) == (
        18,
        17,
        2,
        1,
    )


def test_too_many_bad_images_end_the_job_with_the_report(prepared: Prepared) -> None:
    files = {**yolo(10), **NAMES}
    for index in range(3):
        files[f"labels/train/train_{index:03d}.txt"] = b"\n0 0.5 0.5 64 64\n"
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError) as caught:
        prepared.run()
    assert caught.value.message == (
        "3 of 20 images (15.0%) are bad, at most 10.0% may be. First: labels/train/train_000.txt:2: "
        "a coordinate lies above 1: pixels in place of fractions? (64); labels/train/train_001.txt:2: "
        "a coordinate lies above 1: pixels in place of fractions? (64); labels/train/train_002.txt:2: "
        "a coordinate lies above 1: pixels in place of fractions? (64). "
        "Correct what the report lists, or take these images out"
    )
    assert caught.value.detail is not None
    assert caught.value.detail["fault_counts"] == {"out_of_bounds": 3}
    assert json.loads((prepared.root / "prepare/report.json").read_text()) == caught.value.detail


def test_bad_images_up_to_the_limit_do_not(prepared: Prepared) -> None:
    files = {**yolo(10), **NAMES}
    for index in range(2):
        files[f"labels/train/train_{index:03d}.txt"] = b"5 0.5 0.5 0.1 0.1\n"
    pack(prepared.archive, files)
    assert prepared.run()["bad_fraction"] == 0.1


def test_no_val_split_is_made_by_the_seed_and_said(tmp_path: Path) -> None:
    files = {**yolo(40, splits=("train",)), **NAMES}
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        prepared = Prepared(tmp_path / str(number))
        pack(prepared.archive, files)
        report = prepared.run(seed=seed)
        assert (
            f"the data set has no val split: 8 of 40 train images are val, chosen by seed {seed}"
            in report["warnings"]
        )
        assert not set(prepared.images("val")) & set(prepared.images("train"))
        chosen.append(prepared.images("val"))
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(val) for val in chosen] == [8, 8, 8]


def test_copies_of_a_picture_stay_on_one_side_of_a_split_of_ours(prepared: Prepared) -> None:
    files = dict(NAMES)
    for index in range(30):
        for copy in range(2):
            files[f"images/{index}_{copy}.jpg"] = draw(index)
            files[f"labels/{index}_{copy}.txt"] = BOX
    pack(prepared.archive, files)
    report = prepared.run()
    assert report["splits"]["val"]["images"] == 12
    assert report["leaks"]["train/val"] == {"equal": 0, "near": 0, "examples": []}


def test_a_val_split_that_is_train_is_a_leak(prepared: Prepared) -> None:
    pack(
        prepared.archive,
        {**yolo(4, splits=("train",)), "data.yaml": b"names: [a]\ntrain: images/train\nval: images/train"},
    )
    report = prepared.run()
    assert prepared.images("val") == prepared.images("train")
    assert report["leaks"]["train/val"]["equal"] == 4
    assert report["leaks"]["train/val"]["examples"][0] == {
        "train": "images/train/train_000.jpg",
        "val": "images/train/train_000.jpg",
        "distance": None,
    }
    assert any(warning.startswith("leak: of 4 images of val, 4 are equal") for warning in report["warnings"])


def test_near_equal_images_are_a_leak(prepared: Prepared) -> None:
    files = {**yolo(4), **NAMES}
    again = io.BytesIO()
    Image.open(io.BytesIO(draw(2))).resize((96, 64)).save(again, "JPEG", quality=40)
    files["images/val/val_001.jpg"] = again.getvalue()
    pack(prepared.archive, files)
    leaks = prepared.run()["leaks"]["train/val"]
    assert (leaks["equal"], leaks["near"]) == (0, 1)
    assert leaks["examples"][0]["train"] == "images/train/train_002.jpg"


def useless(**files: bytes | None) -> dict[str, bytes]:
    """Return a drawn set in which files whose name holds a key are replaced, or taken out."""
    result = {}
    for name, content in {**yolo(3), **NAMES}.items():
        replaced = [new for key, new in files.items() if name.startswith(key.replace("__", "/"))]
        kept = replaced[-1] if replaced else content
        if kept is not None:
            result[name] = kept
    return result


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (useless(labels=b""), "none of the 6 images has a labelled object: .* as labels/train/train_000.txt"),
        (useless(labels__val=b""), "no image of the val split has a labelled object: 3 images"),
        (useless(labels__val=None), "no image of the val split .* images/val/val_000.jpg"),
        (useless(labels=None), "no image has a label file"),
        ({**useless(labels=None), "a.xml": b"x"}, r"found 1 \.xml \(Pascal VOC\), which must be converted"),
        (useless(images=None), "the archive holds no image"),
        (useless(images__train=None, labels__train=None), "the train split has no usable image"),
        (useless(data=None), "no class names: put a data.yaml"),
        ({"images/a.jpg": draw(0), "labels/a.txt": BOX, **NAMES}, "1 usable train image"),
        (useless(images__val=b"GIF89a"), "3 of 6 images .* images/val/val_000.jpg: .*a GIF; convert"),
    ],
)
def test_what_would_train_rubbish_is_refused(
    prepared: Prepared, files: dict[str, bytes], message: str
) -> None:
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError, match=message) as caught:
        prepared.run()
    assert caught.value.detail is not None


def test_class_names_come_from_the_job_when_the_set_has_none(prepared: Prepared) -> None:
    pack(prepared.archive, yolo(2))
    assert prepared.run(names=["Flasche"])["names"] == ["Flasche"]


def test_class_names_of_the_set_win_over_those_of_the_job(prepared: Prepared) -> None:
    pack(prepared.archive, {**yolo(2), **NAMES})
    report = prepared.run(names=["other"])
    assert report["names"] == ["bottle", "can"]
    assert "the job's class names differ from those in data.yaml, which count" in report["warnings"]


def test_a_hostile_file_name_is_shown_escaped(prepared: Prepared) -> None:
    files = {**yolo(20), **NAMES, "images/train/\u202egpj.jpg": b"no image"}
    pack(prepared.archive, files)
    report = prepared.run()
    assert report["faults"][0]["file"] == "images/train/\\u202egpj.jpg"


def test_a_report_of_many_faults_is_capped_but_counts_all(prepared: Prepared) -> None:
    folder = "x" * 180
    files = {**yolo(2), **NAMES}
    for index in range(1500):
        files[f"images/train/{folder}/{index}.jpg"] = b""
    pack(prepared.archive, files)
    with pytest.raises(DatasetInvalidError) as caught:
        prepared.run()
    report = caught.value.detail
    assert report is not None
    assert report["fault_counts"] == {"image_unreadable": 1500}
    assert len(report["faults"]) == 1000
    assert (prepared.root / "prepare/report.json").stat().st_size < 1_000_000


def test_a_stop_ends_it_between_two_images(prepared: Prepared) -> None:
    pack(prepared.archive, {**yolo(2), **NAMES})
    reader, writer = os.pipe()
    child = Child(root=prepared.root, directory=prepared.root / "prepare", progress_fd=writer)
    child.stop_requested.set()
    with pytest.raises(StopRequestedError):
        run({"archive": "in/dataset.zip", "job_type": "yolo11", "limits": LIMITS}, child)
    os.close(reader)
    os.close(writer)


def test_the_child_tells_how_far_it_is(prepared: Prepared) -> None:
    pack(prepared.archive, {**yolo(20), **NAMES})
    reader, writer = os.pipe()
    job: dict[str, object] = {
        "task": "prepare",
        "archive": "in/dataset.zip",
        "job_type": "yolo11",
        "label_task": "detect",
        "names": None,
        "seed": 0,
    }
    job |= {"val_fraction": 0.2, "max_bad_fraction": 0.1, "limits": LIMITS, "progress_fd": writer}
    (prepared.root / "prepare" / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "rvmcv_worker.compute.child", "prepare"]
    subprocess.run(command, cwd=prepared.root, pass_fds=[writer], check=True)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        messages = [header for header, _ in Decoder().feed(pipe.read(), 0.0)]
    fractions = [message["fraction"] for message in messages]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {message["phase"] for message in messages} == {"verify"}
    assert any(message.get("images_done") == message.get("images_total") == 40 for message in messages)
    result = json.loads((prepared.root / "prepare" / "result.json").read_text())
    assert result["ok"]
    assert result["result"] == json.loads((prepared.root / "prepare" / "report.json").read_text())


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "image_unreadable"),
        (b"text", "image_unreadable"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "image_unreadable"),
        (draw(1, form="GIF"), "image_unreadable"),
        (png(100_000, 100_000), "image_too_large"),
        (png(40, 40), "image_damaged"),
        (draw(1, size=(9, 40)), "image_too_small"),
        (draw(1)[:400], "image_damaged"),
        (draw(1, form="PNG")[:400], "image_damaged"),
        (draw(1)[:-2], "image_damaged"),
        (draw(1) + b"trailer", "image_restored"),
    ],
)
def test_images_that_would_make_trouble_are_told(content: bytes, code: str) -> None:
    facts = inspect_image(content, 25_000_000)
    assert facts.fault is not None
    assert facts.fault.kind.code == code
    assert facts.bad == (code != "image_restored")
    if facts.restored:
        assert inspect_image(facts.restored, 25_000_000) == ImageFacts(facts.dhash)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000"])
def test_each_format_is_read(form: str) -> None:
    facts = inspect_image(draw(7, form=form), 25_000_000)
    assert facts.fault is None
    assert facts.dhash is not None


def test_an_even_picture_has_no_hash() -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(out, "PNG")
    assert inspect_image(out.getvalue(), 10_000) == ImageFacts(None)


def test_a_real_set_keeps_every_image_and_byte(prepared: Prepared, shared: Path) -> None:
    source = shared / "datasets" / "pet_hdpe_det"
    pack_folder(prepared.archive, source)
    report = prepared.run()
    assert {split: found["instances"] for split, found in report["splits"].items()} == {
        "train": 156,
        "val": 48,
        "test": 30,
    }
    assert report["splits"]["train"]["per_class"] == {"HDPE": 73, "PET": 83}
    assert report["splits"]["train"]["background"] == 47
    assert report["fault_counts"] == {}
    for kind in ("images", "labels"):
        for file in (source / kind).rglob("*.*"):
            placed = prepared.data / file.relative_to(source)
            assert hashlib.sha256(placed.read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_a_real_segmentation(prepared: Prepared, shared: Path) -> None:
    pack_folder(prepared.archive, shared / "datasets" / "garbage_seg", "garbage/")
    report = prepared.run(label_task="segment")
    assert {split: found["instances"] for split, found in report["splits"].items()} == {
        "train": 324,
        "val": 239,
    }
    assert report["splits"]["train"]["background"] == 6
    assert report["leaks"]["train/val"]["near"] == 1


def test_real_files_that_mix_boxes_and_polygons(prepared: Prepared, shared: Path) -> None:
    pack_folder(prepared.archive, shared / "datasets/defective/mixed_box_polygon")
    with pytest.raises(DatasetInvalidError, match=r"24 of 24 images .*\.txt:\d+: boxes and polygons in one"):
        prepared.run()


def test_real_slivers_cost_their_lines(prepared: Prepared, shared: Path) -> None:
    pack_folder(prepared.archive, shared / "datasets/defective/sliver_polygons")
    report = prepared.run(label_task="segment", names=["a", "b"])
    assert report["fault_counts"] == {"sliver_polygon": 4}
    assert report["bad_images"] == 0


def test_real_false_background_is_refused(prepared: Prepared, shared: Path) -> None:
    pack_folder(prepared.archive, shared / "datasets/defective/unlabelled_hdpe_as_background")
    with pytest.raises(DatasetInvalidError, match="none of the 4 images has a labelled object"):
        prepared.run(names=["HDPE"])


def test_real_class_ids_of_another_list_are_refused(prepared: Prepared, shared: Path) -> None:
    labels = sorted(
        (shared / "datasets/defective/coco91_class_ids_in_80_class_seg/labels_train2017").iterdir()
    )
    files = {f"labels/train2017/{file.name}": file.read_bytes() for file in labels}
    for index, file in enumerate(labels):
        files[f"images/train2017/{file.stem}.jpg"] = draw(index)
    pack(prepared.archive, files)
    names = [f"class {index}" for index in range(80)]
    with pytest.raises(
        DatasetInvalidError, match=r"19 of 100 images .*class 8\d, but 80 classes are named"
    ) as caught:
        prepared.run(label_task="segment", names=names)
    assert caught.value.detail is not None
    assert set(caught.value.detail["fault_counts"]) >= {"class_out_of_range"}


def test_real_voc_is_named_and_its_zero_size_boxes_cost_a_line(tmp_path: Path, shared: Path) -> None:
    source = shared / "datasets/defective/voc_zero_size_box"
    raw = Prepared(tmp_path / "raw")
    pack_folder(raw.archive, source)
    with pytest.raises(DatasetInvalidError, match="Pascal VOC"):
        raw.run(names=["RBC"])
    converted = Prepared(tmp_path / "converted")
    files = {}
    for image in source.glob("*.jpg"):
        files[f"images/{image.name}"] = image.read_bytes()
        text = image.with_suffix(".xml").read_text()
        values = [
            [int(part.split(f"</{key}>")[0]) for part in text.split(f"<{key}>")[1:]]
            for key in ("xmin", "ymin", "xmax", "ymax")
        ]
        lines = [
            f"0 {(x1 + x2) / 1280} {(y1 + y2) / 960} {(x2 - x1) / 640} {(y2 - y1) / 480}"
            for x1, y1, x2, y2 in zip(*values, strict=True)
        ]
        files[f"labels/{image.stem}.txt"] = "\n".join(lines).encode()
    pack(converted.archive, files)
    report = converted.run(names=["RBC"])
    assert report["fault_counts"]["zero_size_box"] >= 2
    assert report["bad_images"] == 0


def test_the_archive_may_be_a_zip_of_stored_files(prepared: Prepared) -> None:
    with zipfile.ZipFile(prepared.archive, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**yolo(2), **NAMES}.items():
            archive.writestr(name, content)
    assert prepared.run()["images"] == 4
