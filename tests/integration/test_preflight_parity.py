"""What the preflight calls good, Ultralytics calls good, and the other way round."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from rvmcv_worker.compute.faults import FaultLog
from rvmcv_worker.compute.layouts import Item, Layout
from rvmcv_worker.compute.preflight import Check, Sample, inspect_all
from rvmcv_worker.compute.yolo_source import YoloSource
from tests.dataset_fixtures import BOX, Prepared, draw, pack, pack_folder

# Ultralytics leaves the files that it cannot read open.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_Judge = Callable[[Path, Path, int], bool]

#: Ours alone: Ultralytics would train on these, to no use.
STRICTER = {"box_in_segment", "nothing_left"}


@pytest.fixture(scope="module")
def ultralytics_accepts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Judge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("YOLO_OFFLINE", "1")
        patch.setenv("YOLO_AUTOINSTALL", "0")
        from ultralytics.data.utils import verify_image_label

        def accepts(image: Path, label: Path, class_count: int) -> bool:
            result = verify_image_label((str(image), str(label), "", False, class_count, 0, 0, False))
            return result[0] is not None

        yield accepts


def ours(image: Path, label: Path, class_count: int, *, segment: bool) -> tuple[Sample, set[str]]:
    log = FaultLog()
    item = Item(
        image=image.name, label=os.path.relpath(label, image.parent) if label.exists() else None, target=""
    )
    names = tuple(map(str, range(class_count)))
    source = YoloSource(image.parent, names, Layout({}, "", ()), segment=segment)
    check = Check(image.parent, source, 100_000_000)
    samples = inspect_all([item], check, log, lambda _done, _total: None)
    return samples[image.name], set(log.counts)


REAL = [
    ("coco8", 80, False),
    ("coco8", 80, True),
    ("coco8-seg", 80, True),
    ("coco8-seg", 80, False),
    ("garbage_seg", 6, True),
    ("pet_hdpe_det", 2, False),
    ("pet_hdpe_det", 1, False),
    ("defective/mixed_box_polygon", 1, False),
    ("defective/mixed_box_polygon", 1, True),
    ("defective/sliver_polygons", 2, True),
    ("defective/sliver_polygons", 1, False),
    ("defective/unlabelled_hdpe_as_background", 1, False),
]


@pytest.mark.parametrize(("name", "class_count", "segment"), REAL)
def test_real_sets_are_judged_alike(
    tmp_path: Path, shared: Path, ultralytics_accepts: _Judge, name: str, class_count: int, segment: bool
) -> None:
    folder = shared / "datasets" / name
    images = [path for path in sorted(folder.rglob("*.*")) if path.suffix in {".jpg", ".png", ".jpeg"}]
    assert images
    for image in images:
        label = Path("labels".join(str(image).rsplit("images", 1))).with_suffix(".txt")
        copy = tmp_path / image.name  # Ultralytics may write
        copy.write_bytes(image.read_bytes())
        sample, codes = ours(copy, label, class_count, segment=segment)
        theirs = ultralytics_accepts(copy, label, class_count)
        assert (not sample.bad) == theirs or (theirs and codes & STRICTER), (image.name, codes)


LABELS = [
    b"",
    b"\n\n",
    b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2",
    b"0.0 .5 .5 2e-1 0.2\r\n",
    b"0 1.01 0.5 0.1 0.1",
    b"0 1.0101 0.5 0.1 0.1",
    b"0 -0.01 0.5 0.1 0.1",
    b"0 -0.0101 0.5 0.1 0.1",
    b"0 0.5 0.5 -0.0001 0.1",
    b"-0 0.5 0.5 0.1 0.1",
    b"-1 0.5 0.5 0.1 0.1",
    b"0.5 0.5 0.5 0.1 0.1",
    b"2 0.5 0.5 0.1 0.1",
    b"1 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1",
    b"nan 0.5 0.5 0.1 0.1",
    b"0 nan 0.5 0.1 0.1",
    b"0 0.5 0.5 inf 0.1",
    b"0 0.5 0.5 1_0 0.1",
    "0 0.5 0.5 \u0660.1 0.1".encode(),
    b"0 0,5 0,5 0,1 0,1",
    b"0 0.5 0.5 0.1",
    b"0 0.5 0.5 0.1 0.1 0.9",
    b"0 0.5 0.5 0.1 0.1\n0 0.5 0.5",
    b"0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1 0.1",
    b"a b c d e",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6 0.5",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6\n0 0.5 0.5 0.1 0.1",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6\n0 0.5 0.5 0.1 0.1 0.2",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6\n0 0.5 0.5",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6\n0 0.5",
    b"0 0.1 0.1 0.5 0.1 0.3 0.6\n0",
    b"0 0.1 0.1 0.5 0.1 0.3 1.05",
    b"0 0.1 0.1 0.5 0.1 0.3 1.2",
    b"0 -0.2 0.1 0.5 0.1 0.3 0.6",
    b"0 -0.6 0.1 0.5 0.1 0.3 0.6",
    b"0 0.1 nan 0.5 0.1 0.3 0.6",
    b"7 0.1 0.1 0.5 0.1 0.3 0.6",
    b"0 0.5 0.5 0.2 0.2\xff",
    "0 0.5 0.5 0.2 0.2".encode("utf-16"),
    b"0 0.5 0.5 0.1 0.1\x0c0 0.4 0.4 0.1 0.1",
]


@pytest.mark.parametrize("content", LABELS)
def test_labels_are_judged_alike(tmp_path: Path, ultralytics_accepts: _Judge, content: bytes) -> None:
    image, label = tmp_path / "a.jpg", tmp_path / "a.txt"
    image.write_bytes(draw(0))
    label.write_bytes(content)
    sample, codes = ours(image, label, 2, segment=False)
    assert sample.bad != ultralytics_accepts(image, label, 2), codes


def turned() -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.open(io.BytesIO(draw(1))).save(out, "JPEG", exif=exif)
    return out.getvalue()


IMAGES = {
    "plain.jpg": draw(0),
    "upper.JPG": draw(0),
    "png.jpg": draw(0, form="PNG"),
    "turned.jpg": turned(),
    "cut.jpg": draw(0)[:500],
    "cut_little.jpg": draw(0)[:-2],
    "trailer.jpg": draw(0) + b"made by a phone",
    "small.png": draw(0, (9, 20), "PNG"),
    "ten.png": draw(0, (10, 10), "PNG"),
    "cut.png": draw(0, form="PNG")[:500],
    "a.bmp": draw(0, form="BMP"),
    "a.webp": draw(0, form="WEBP"),
    "a.tiff": draw(0, form="TIFF"),
    "a.avif": draw(0, form="AVIF"),
    "a.jp2": draw(0, form="JPEG2000"),
    "gif.jpg": draw(0, form="GIF"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_judged_alike(tmp_path: Path, ultralytics_accepts: _Judge, name: str) -> None:
    mine, theirs = tmp_path / "mine" / name, tmp_path / "theirs" / name
    for image in (mine, theirs):
        image.parent.mkdir()
        image.write_bytes(IMAGES[name])
    sample, codes = ours(mine, tmp_path / "a.txt", 2, segment=False)
    assert sample.bad != ultralytics_accepts(theirs, tmp_path / "a.txt", 2), codes
    assert mine.read_bytes() == theirs.read_bytes()  # what it restores we restore to the same bytes


@pytest.mark.usefixtures("ultralytics_accepts")
def test_the_prepared_set_is_read_in_the_order_of_the_original(tmp_path: Path, shared: Path) -> None:
    """The same files in the same order, so that a training gives the same figures as without the worker."""
    from ultralytics.data.utils import IMG_FORMATS, img2label_paths

    source = shared / "datasets" / "pet_hdpe_det"
    prepared = Prepared(tmp_path / "job")
    pack_folder(prepared.archive, source)
    prepared.run()
    for split in ("train", "val", "test"):
        original, placed = (
            sorted(
                str(path)
                for path in (root / "images" / split).rglob("*.*")
                if path.suffix[1:].lower() in IMG_FORMATS
            )
            for root in (source, prepared.data)
        )
        assert [Path(path).name for path in placed] == [Path(path).name for path in original]
        for one, other in zip(img2label_paths(placed), img2label_paths(original), strict=True):
            assert Path(one).read_bytes() == Path(other).read_bytes()


@pytest.mark.usefixtures("ultralytics_accepts")
def test_ultralytics_takes_the_yaml_and_the_layout(tmp_path: Path) -> None:
    from ultralytics.data.utils import check_det_dataset

    prepared = Prepared(tmp_path / "job")
    files = {"data.yaml": b"names: ['no', 'Fl\xc3\xa4sche: 1']\n"}
    for split in ("train", "valid"):
        for index in range(3):
            files[f"set/{split}/images/{index}.jpg"] = draw(index + (10 if split == "valid" else 0))
            files[f"set/{split}/labels/{index}.txt"] = BOX
    pack(prepared.archive, files)
    prepared.run()
    data = check_det_dataset(str(prepared.root / "prepare" / "data.yaml"), autodownload=False)
    assert data["names"] == {0: "no", 1: "Fläsche: 1"}
    assert (data["train"], data["val"]) == (
        str(prepared.data / "images/train"),
        str(prepared.data / "images/val"),
    )
