"""Data sets that must not be trained on, as an admin would queue them: named, told, wiped."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rvmcv_worker.reference.server import ReferenceServer
from tests.dataset_fixtures import draw, pack, pack_folder, yolo
from tests.training_jobs import first_error
from tests.worker_process import WorkerProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(shared_server: ReferenceServer) -> ReferenceServer:
    return shared_server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: ReferenceServer) -> Iterator[WorkerProcess]:
    """One daemon for the whole module, so that each test also shows that the next job runs."""
    directory = tmp_path_factory.mktemp("worker")
    with WorkerProcess(directory, server, job_types=("yolo11",), scale=0.02) as running:
        yield running


def _refused(server: ReferenceServer, worker: WorkerProcess, archive: Path, **config: object) -> str:
    """Queue a training on the archive; returns with which words it is refused as `dataset_invalid`."""
    url = server.put_object("datasets", archive.name, archive)
    error = first_error(server, worker, {"dataset_url": url, **config})
    assert error["code"] == "dataset_invalid"
    return error["message"]


def _truncated(path: Path) -> None:
    pack(path, yolo(4))
    os.truncate(path, path.stat().st_size // 2)


def _encrypted(path: Path) -> None:
    content = bytearray(pack(path, yolo(2)).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    link = zipfile.ZipInfo("train/images/a.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")


def _nested(path: Path) -> None:
    pack(path, {"inner.zip": pack(path.with_suffix(".inner"), yolo(2)).read_bytes()})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_truncated, "zip"),
        (_encrypted, "encrypted"),
        (_link, "link"),
        (_nested, "archive"),
        (lambda path: pack(path, {"images/a.bmp": bytes(20_000_000)}), "times its own size"),
        (lambda path: pack(path, {"../evil.jpg": draw(1)}), ".."),
        (lambda path: pack(path, {"/evil.jpg": draw(1)}), "absolute"),
        (lambda path: pack(path, {"readme.md": b"x"}), "holds no image"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "web page"),
    ],
    ids=["truncated", "encrypted", "link", "nested", "bomb", "dots", "absolute", "no image", "no archive"],
)
def test_a_hostile_or_useless_archive(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    archive = tmp_path / "bad.zip"
    make(archive)
    assert said in _refused(server, worker, archive)


def test_real_labels_that_mix_boxes_and_polygons(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, shared: Path
) -> None:
    archive = pack_folder(tmp_path / "mixed.zip", shared / "datasets/defective/mixed_box_polygon")
    said = _refused(server, worker, archive)
    assert "24 of 24 images" in said
    assert "boxes and polygons in one" in said


def test_real_class_ids_of_another_list(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, shared: Path
) -> None:
    labels = shared / "datasets/defective/coco91_class_ids_in_80_class_seg/labels_train2017"
    files = {}
    for index, file in enumerate(sorted(labels.iterdir())):
        files[f"labels/train2017/{file.name}"] = file.read_bytes()
        files[f"images/train2017/{file.stem}.jpg"] = draw(index)
    names = [f"class {index}" for index in range(80)]
    archive = pack(tmp_path / "coco91.zip", files)
    said = _refused(server, worker, archive, names=names, base_model="yolo11n-seg.yaml")
    assert "19 of 100 images" in said
    assert "but 80 classes are named" in said


def test_real_objects_without_labels(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, shared: Path
) -> None:
    folder = shared / "datasets/defective/unlabelled_hdpe_as_background"
    archive = pack_folder(tmp_path / "unlabelled.zip", folder)
    assert "none of the 4 images has a labelled object" in _refused(server, worker, archive, names=["HDPE"])


def test_real_labels_of_another_format(
    server: ReferenceServer, worker: WorkerProcess, tmp_path: Path, shared: Path
) -> None:
    archive = pack_folder(tmp_path / "voc.zip", shared / "datasets/defective/voc_zero_size_box")
    assert "Pascal VOC" in _refused(server, worker, archive, names=["RBC"])
