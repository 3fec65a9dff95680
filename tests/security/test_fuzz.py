"""Whatever comes from outside ends in a value or in one of the errors that say so: no traceback, no hang.

The ordinary test run feeds each target a hundred inputs, always the same; `make fuzz MINUTES=` many others.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rvmcv_worker import answers, batch_checkpoint, engine_answer, executor, framing, manifest, protocol
from rvmcv_worker.compute import archive, checkpoint_file, pickle_scan
from rvmcv_worker.compute.coco_json import read_coco
from rvmcv_worker.compute.data_yaml import read_data_yaml
from rvmcv_worker.compute.labels import parse_label
from rvmcv_worker.config import Settings, StorageSettings
from rvmcv_worker.engine_wire import MaskFormat, Options
from rvmcv_worker.errors import (
    DatasetInvalidError,
    InvalidJobError,
    JobCrashedError,
    ModelInvalidError,
    UnsupportedJobError,
    UrlForbiddenError,
)
from rvmcv_worker.jobs import JOB_TYPES, training_results
from rvmcv_worker.urls import classify
from tests.dataset_fixtures import BOX, Prepared, draw, limits, pack, yolo
from tests.fuzzing import TARGETS, HungError, a_round, as_json, damaged, feed, no_hang, spoiled, values

SHA = "0" * 64
JOB = {
    "job_id": "train_1",
    "id": 17,
    "job_type": "yolo11",
    "priority": 0,
    "created_at": "2026-01-09T19:30:00Z",
    "config": {"dataset_id": 3},
}
ANSWERS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (
        protocol.Claim,
        {
            "lease_token": "t",
            "attempt": 1,
            "lease_s": 60,
            "report_interval_s": 2,
            "resume": {"path": "a/b", "url": "https://x/a", "sha256": SHA, "epoch": 3, "next_index": 1},
        },
    ),
    (protocol.ProgressAnswer, {"directive": "continue"}),
    (protocol.FinishAnswer, {"accepted": True}),
    (
        protocol.WorkerStatusAnswer,
        {"leases": {"a": "ok"}, "desired_state": "run", "interval_s": {"idle": 10, "busy": 3}},
    ),
    (protocol.UploadSlots, {"uploads": {"best.pt": {"url": "https://x/a", "path": "p"}}}),
    (
        protocol.DatasetInfo,
        {
            "dataset_id": 3,
            "name": "a",
            "images_count": 4,
            "download_url": "/a",
            "sha256": SHA,
            "size_bytes": 5,
        },
    ),
    (
        protocol.UploadedModel,
        {"model_id": 3, "sha256_hash": SHA, "file_size_mb": 1.5, "file_path": "a"},
    ),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "yolo11": {
        "dataset_id": 3,
        "dataset_url": "s3://datasets/a.zip",
        "dataset_sha256": SHA,
        "base_model": "yolo11n.pt",
        "base_model_sha256": SHA,
        "epochs": 100,
        "img_size": 640,
        "batch_size": 16,
        "patience": 50,
        "gpus": 1,
        "device": "0,1",
        "seed": 0,
        "names": ["a", "b"],
        "lr0": 0.01,
        "time_limit_h": 2.5,
    },
    "sam2": {
        "dataset_id": 3,
        "base_model": "sam2.1_hiera_tiny",
        "epochs": 4,
        "img_size": 1024,
        "batch_size": 1,
        "train": "decoder",
        "names": ["a"],
    },
    "inference": {
        "image_url": "https://x/a.jpg",
        "image_sha256": SHA,
        "model_version": "yolo11_v3",
        "model_sha256": SHA,
        "confidence": 0.5,
        "segmentation": True,
        "mask_format": "rle",
    },
    "batch-inference": {
        "images": [{"id": 1, "url": "https://x/a.jpg"}],
        "manifest_url": "s3://a/b",
        "model_version": "yolo11_v3",
        "part_images": 10,
    },
    "stub": {"steps": 3, "step_s": 0.1, "device": [0, 1], "gpus": 2},
}


def test_every_job_type_is_fed() -> None:
    assert set(CONFIGS) == set(JOB_TYPES)


# -- what RVM-Server answers ---------------------------------------------------------------------


@a_round
@given(
    damaged(as_json({"jobs": [JOB], "more": [1.5, None, "ä", {"a": {"b": [[]]}}]})) | st.binary(max_size=99)
)
def _json(data: bytes) -> None:
    with no_hang(), contextlib.suppress(protocol.AnswerError):
        body = protocol.parse_json(data)
        protocol.encode(body)


@a_round
@given(
    st.sampled_from(
        ["[", '{"a":', '[{"a":', '"\\u0000', "9", "-", "1e", "1.", '{"a":1,"a":', "NaN,", "\\", '"']
    )
    .flatmap(lambda text: st.integers(1, 200_000).map(lambda count: text * (count // len(text))))
    .map(lambda text: text.encode())
)
def _long_json(data: bytes) -> None:
    with no_hang(), contextlib.suppress(protocol.AnswerError):
        protocol.parse_json(b'{"jobs": ' + data + b"}")


@a_round
@given(spoiled({"jobs": [JOB, JOB]}))
def _offers(body: Any) -> None:
    with no_hang(), contextlib.suppress(protocol.AnswerError):
        for offer in protocol.parse_offers(protocol.parse_json(as_json(body))):
            if isinstance(offer, protocol.JobOffer):
                _config(offer.job_type, offer.config)
            else:
                assert len(offer.reason) < 2000
                if offer.job_id is not None:
                    asked = protocol.ClaimRequest(
                        job_id=offer.job_id, worker_id="w", instance_id=UUID, claim_id=UUID
                    )
                    protocol.encode(asked)


UUID = "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11"


@a_round
@given(st.sampled_from(ANSWERS).flatmap(lambda pair: st.tuples(st.just(pair[0]), spoiled(pair[1]))))
def _models(pair: tuple[type[BaseModel], Any]) -> None:
    model, body = pair
    with no_hang(), contextlib.suppress(protocol.AnswerError):
        parsed = protocol.parse(model, protocol.parse_json(as_json(body)))
        # Everything that was let in can be sent and stored: it is finite, and text.
        protocol.encode(parsed.model_dump(mode="json"))


@a_round
@given(
    st.sampled_from([200, 201, 204, 302, 400, 401, 403, 404, 409, 413, 422, 429, 500, 999]),
    st.dictionaries(
        st.sampled_from(["Retry-After", "Location", "Date", "Content-Type"]),
        st.text(st.characters(codec="latin-1"), max_size=40)
        | st.sampled_from(["9" * 400, "-1", "Fri, 31 Dec 9999 23:59:59 -2359", "http://[", "//", "1e9"]),
    ),
    damaged(b'{"reason": "taken", "message": "no https://a/b?sig=1"}') | st.binary(max_size=60),
)
def _answers(status: int, headers: dict[str, str], body: bytes) -> None:
    with no_hang():
        error = answers.error_of(
            "GET /a", status, headers, body, sent_bytes=1, secrets=("sig",), fencing=True
        )
        assert "\n" not in str(error)
        wait_s = answers.retry_after_s(headers)
        assert wait_s is None or 0 <= wait_s <= answers.MAX_RETRY_AFTER_S


def _config(name: str, config: Any) -> None:
    job_type = JOB_TYPES.get(name)
    if job_type is None or not isinstance(config, dict):
        return
    assert job_type.gpus(config) >= 1
    try:
        job_type.parse(config)
    except (InvalidJobError, UnsupportedJobError) as error:
        protocol.encode(protocol.WireError(code=error.code, message=error.message))


@a_round
@given(
    st.sampled_from(sorted(CONFIGS)).flatmap(lambda name: st.tuples(st.just(name), spoiled(CONFIGS[name])))
)
def _configs(pair: tuple[str, Any]) -> None:
    name, config = pair
    with no_hang(), contextlib.suppress(framing.FramingError):
        _config(name, framing.parse_object(as_json(config)))


SETTINGS = Settings(
    storage=StorageSettings(s3_endpoint="https://minio.test:9000", allowed_hosts=("a.test", "*.b.test"))
)


@a_round
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "https:",
                "http:",
                "s3:",
                "//",
                "/",
                "a.test",
                "x.b.test",
                ":",
                "443",
                "@",
                "%2e",
                "..",
                "[::1]",
                "?",
                "#",
                "\\",
                " ",
                "\t",
                "%00",
                "a",
                "127.1",
                "é",
                "\uff0e",
                "%",
                ";",
                "file:",
                "&",
            ]
        ),
        max_size=10,
    ).map("".join)
)
def _urls(url: str) -> None:
    with no_hang(), contextlib.suppress(UrlForbiddenError):
        str(classify(url, SETTINGS))


# -- what a child and an engine say --------------------------------------------------------------

MESSAGE = framing.encode({"epoch": 3, "losses": {"box": 1.5}, "payload_bytes": 0})


@a_round
@given(st.lists(damaged(MESSAGE) | st.binary(max_size=20), max_size=4), st.integers(1, 50))
def _frames(pieces: list[bytes], step: int) -> None:
    decoder = framing.Decoder(max_payload_bytes=100)
    data = b"".join(pieces)
    with no_hang(), contextlib.suppress(framing.FramingError):
        for start in range(0, len(data), step):
            for header, _ in decoder.feed(data[start : start + step], 0.0):
                protocol.encode(protocol.progress_of(header))


PROGRESS = {
    "fraction": 0.5,
    "phase": "train",
    "epoch": 1,
    "epochs": 3,
    "batch_size": 4,
    "losses": {"box": 1.0},
    "metrics": {"map50": 0.5},
    "history": [{"epoch": 1}],
    "eta_s": 5.0,
    "checkpoint": {"path": "a", "sha256": SHA, "epoch": 1},
    "message": "a",
}
RESULT = {"names": ["a"], "leaks": {"val": {"equal": 0, "near": 1}}}
TRAINED = {"metrics": {"fitness": 0.5, "active": {}}, "effective": {}, "versions": {}, "attempts": [{}]}


@a_round
@given(spoiled(PROGRESS), spoiled(RESULT), spoiled(TRAINED), spoiled({"code": "internal", "message": "x"}))
def _children(progress: Any, prepared: Any, trained: Any, error: Any) -> None:
    with no_hang():
        if isinstance(error, dict):
            found = executor._error_of(error, None, oom_killed=False)
            protocol.encode(protocol.WireError(code=found.code, message=found.message))
        if isinstance(progress, dict):
            protocol.encode(protocol.progress_of(progress))
        for kind, value in ((training_results.Prepared, prepared), (training_results.Trained, trained)):
            with contextlib.suppress(JobCrashedError):
                training_results.require(kind, "train", value, ())


ANSWER = {
    "image_size": [640, 480],
    "detections": [
        {
            "class": "PET",
            "confidence": 0.5,
            "bbox": [1, 2, 3, 4],
            "segmentation": {"size": [480, 640], "counts": "0o"},
        }
    ],
    "backend": "torch-cpu",
    "precision": "fp32",
    "batch": 1,
    "device": "cpu",
    "timings": {"infer": 0.5},
}
SAID = {"id": 7, "ok": False, "picture_bytes": 0, "error": {"code": "image_invalid", "message": "x"}}


@a_round
@given(
    spoiled(ANSWER),
    spoiled(SAID),
    spoiled({"ready": True, "device": "cpu", "versions": {"a": "1"}}),
    st.sampled_from(list(MaskFormat)),
    st.integers(0, 300),
)
def _engines(answer: Any, said: Any, ready: Any, form: MaskFormat, picture_bytes: int) -> None:
    options = Options(segmentation=True, mask_format=form, annotated=True)
    with no_hang():
        with contextlib.suppress(engine_answer.AnswerError):
            result, _ = engine_answer.read_result(as_json(answer), picture_bytes, options)
            protocol.encode(result)
        with contextlib.suppress(engine_answer.AnswerError, framing.FramingError):
            found = engine_answer.read_said(framing.parse_object(as_json(said)))
            if found.ok is False:
                assert "\n" not in found.to_error().message
        with contextlib.suppress(engine_answer.AnswerError, framing.FramingError):
            engine_answer.read_ready(framing.parse_object(as_json(ready)))


# -- what users upload ---------------------------------------------------------------------------


def _within(look: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder, no_hang():
        look(Path(folder))


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images/a.jpg", draw(1))
        file.writestr("labels/a.txt", BOX)
        file.writestr("data.yaml", "names: [a]\n")
        file.writestr("notes.json", "{}")
    return out.getvalue()


def _tar(kind: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{kind}", format=tarfile.PAX_FORMAT) as file:
        for name, content in (("images/" + "a" * 120 + ".jpg", draw(1)), ("labels/a.txt", BOX)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return out.getvalue()


ZIP = _zip()
TARS = [_tar(kind) for kind in ("", "gz", "bz2", "xz")]


def _unpacks(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "dataset").write_bytes(content)
        with contextlib.suppress(DatasetInvalidError):
            archive.extract(
                folder / "dataset",
                folder / "data",
                limits(max_unpacked_bytes=1_000_000),
                lambda _: None,
                with_json=True,
            )
        assert {path.name for path in folder.iterdir()} <= {"dataset", "data"}
        for path in (folder / "data").rglob("*"):
            assert path.is_dir() or (path.is_file() and not path.is_symlink())

    _within(look)


@a_round
@given(damaged(ZIP, most=3) | damaged(ZIP[-400:]).map(lambda end: ZIP[:-400] + end))
def _zips(content: bytes) -> None:
    _unpacks(content)


@a_round
@given(
    st.sampled_from(TARS).flatmap(damaged) | damaged(TARS[0][:3000]).map(lambda start: start + TARS[0][3000:])
)
def _tars(content: bytes) -> None:
    _unpacks(content)


NUMBERS = st.sampled_from(
    ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "9" * 400, "1_0", "٣", "0x1", "", "a"]
)
LABELS = st.lists(st.lists(NUMBERS, max_size=9).map(" ".join), max_size=6).map("\n".join)


@a_round
@given(LABELS.map(lambda text: text.encode()) | damaged(BOX * 3), st.booleans())
def _labels(content: bytes, segment: bool) -> None:
    with no_hang():
        label = parse_label(content, 2, segment=segment)
        assert all(fault.reason.isprintable() for fault in label.faults)


YAML = b"path: ../x\ntrain: [images/train]\nval: images/val\nnc: 2\nnames: {0: a, 1: 'b'}\n"


@a_round
@given(
    damaged(YAML)
    | values.map(lambda value: b"train: a\nnames: " + as_json(value))
    | st.sampled_from(["[", "{a: ", "- ", "? ", "&a [*a, ", "'", "!!python/object/apply:os.system "]).flatmap(
        lambda text: st.integers(1, 30_000).map(lambda count: b"names: " + (text * count).encode()[:100_000])
    )
)
def _yaml(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "data.yaml").write_bytes(content)
        with contextlib.suppress(DatasetInvalidError):
            read_data_yaml(folder, ["data.yaml"])

    _within(look)


COCO = {
    "info": {"a": [1]},
    "images": [{"id": 1, "file_name": "a.jpg", "height": 32, "width": 48}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": {"size": [32, 48], "counts": "0o"}},
        {"id": 3, "image_id": 1, "category_id": 1, "segmentation": {"size": [2, 2], "counts": [1, 3]}},
    ],
    "categories": [{"id": 1, "name": "a", "supercategory": "b"}],
}


@a_round
@given(spoiled(COCO).map(as_json) | damaged(as_json(COCO)))
def _coco(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "a.json").write_bytes(content)
        with contextlib.suppress(DatasetInvalidError):
            read_coco(folder / "a.json", "a.json", 1_000_000, lambda: None)

    _within(look)


PICTURES = yolo(3)
COCO_FILES = {f"train/{n}.jpg": draw(n) for n in range(4)}


@a_round
@given(
    st.dictionaries(st.sampled_from([n for n in PICTURES if n.endswith(".txt")]), LABELS, max_size=4),
    damaged(YAML, most=2) | st.none(),
    spoiled(COCO).map(as_json) | st.none(),
    st.booleans(),
)
def _data_sets(labels: dict[str, str], yaml: bytes | None, coco: bytes | None, segment: bool) -> None:
    def look(folder: Path) -> None:
        prepared = Prepared(folder / "work")
        files = {**PICTURES, **{name: text.encode() for name, text in labels.items()}}
        if yaml is not None:
            files["data.yaml"] = yaml
        if coco is not None:
            files = {**COCO_FILES, "train/_annotations.coco.json": coco}
        pack(prepared.archive, files)
        try:
            report = prepared.run_sam2() if segment else prepared.run()
        except DatasetInvalidError:
            return
        framing.parse_object(as_json(report))

    _within(look)


LINES = (
    b'{"id": 1, "url": "https://x/a"}\n{"id": "b", "url": "https://x/b", "sha256": "' + b"0" * 64 + b'"}\n'
)


@a_round
@given(damaged(LINES) | spoiled({"id": 1, "url": "https://x/a"}).map(as_json))
def _manifests(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "list").write_bytes(content)
        with contextlib.suppress(DatasetInvalidError):
            manifest.survey(folder / "list", "the list")
            for entry in manifest.read(folder / "list"):
                assert (entry.listed is None) == (entry.fault is not None)

    _within(look)


# -- what earlier attempts and trainings left ----------------------------------------------------


def _pt(data_pkl: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("best/data.pkl", data_pkl)
        file.writestr("best/data/0", b"\0" * 64)
        file.writestr("best/version", b"3\n")
    return out.getvalue()


PICKLE = pickle.dumps({"model": OrderedDict(a=[1, 2.5, None]), "names": ("x", b"y"), "n": {1, 2}}, protocol=2)


@a_round
@given(damaged(PICKLE).map(_pt) | damaged(_pt(PICKLE)) | st.binary(max_size=200).map(_pt))
def _pickles(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "best.pt").write_bytes(content)
        with contextlib.suppress(ModelInvalidError):
            pickle_scan.refuse_dangerous(folder / "best.pt")

    _within(look)


def _checkpoint() -> bytes:
    state = checkpoint_file.State(
        epochs=1, runs=(checkpoint_file.Run(attempt=1, epochs=1, batch_size=2),), history=({"epoch": 1},)
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "w").write_bytes(b"weights")
        checkpoint_file.write(Path(folder), state, {"last.pt": Path(folder) / "w"})
        (written,) = Path(folder).glob("*.tar")
        return written.read_bytes()


@a_round
@given(damaged(_checkpoint()) | damaged(_checkpoint()[:600]).map(lambda start: start + _checkpoint()[600:]))
def _checkpoints(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "last.tar").write_bytes(content)
        (folder / "into").mkdir()
        with contextlib.suppress(checkpoint_file.CheckpointError):
            checkpoint_file.unpack(folder / "last.tar", folder / "into", frozenset({"last.pt"}))
        assert {path.name for path in (folder / "into").iterdir()} <= {"last.pt"}

    _within(look)


BATCH = {
    "version": 1,
    "batch_sha256": SHA,
    "next_index": 3,
    "parts": [{"path": "a", "sha256": SHA, "images": 3}],
    "summary": {"images_ok": 3},
}


@a_round
@given(spoiled(BATCH).map(as_json) | damaged(as_json(BATCH)))
def _batches(content: bytes) -> None:
    def look(folder: Path) -> None:
        (folder / "checkpoint").write_bytes(content)
        found = batch_checkpoint.read(folder / "checkpoint", SHA, 10)
        assert found.next_index <= 10

    _within(look)


FED: dict[str, Callable[[], None]] = {
    "json": _json,
    "long JSON": _long_json,
    "offers": _offers,
    "answers": _models,
    "statuses and headers": _answers,
    "configs": _configs,
    "URLs": _urls,
    "frames": _frames,
    "children": _children,
    "engines": _engines,
    "zips": _zips,
    "tars": _tars,
    "labels": _labels,
    "data.yaml": _yaml,
    "COCO": _coco,
    "data sets": _data_sets,
    "manifests": _manifests,
    "pickles": _pickles,
    "checkpoints": _checkpoints,
    "batches": _batches,
}


@pytest.mark.parametrize("code", [[], {}, None, 3, "no_such_code"])
def test_an_error_code_that_is_none_is_a_crash(code: Any) -> None:
    error = {"code": code, "message": "x"}
    assert isinstance(executor._error_of(error, None, oom_killed=False), JobCrashedError)
    with pytest.raises(engine_answer.AnswerError, match="not its to report"):
        engine_answer.read_said({"id": 1, "ok": False, "error": error}).to_error()


def test_a_reader_that_raises_or_hangs_is_found() -> None:
    @settings(a_round, max_examples=5000)
    @given(spoiled({"code": "a"}))
    def trusting(value: Any) -> None:
        if isinstance(value, dict) and isinstance(value.get("code"), list):
            raise TypeError("unhashable")

    def spins() -> None:
        with no_hang(0.05):
            while True:
                pass

    with pytest.raises(TypeError, match="unhashable"):
        trusting()
    with pytest.raises(HungError):
        spins()


@pytest.mark.parametrize("name", FED)
def test_every_input_ends_in_a_value_or_in_an_error_that_says_so(name: str) -> None:
    assert len(FED) == TARGETS
    feed(FED[name])
