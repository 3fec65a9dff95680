"""What the daemon makes of an engine that crashes, hangs or lies, shown with one that does so at will."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rvmcv_worker import engine_process
from rvmcv_worker.config import Settings
from rvmcv_worker.engine_client import Ask, Engines
from rvmcv_worker.engine_exports import EngineExports
from rvmcv_worker.engine_process import Machine
from rvmcv_worker.engine_wire import Options, Queue, Trust
from rvmcv_worker.errors import (
    DiskQuotaError,
    ImageInvalidError,
    JobCancelledError,
    JobCrashedError,
    ModelInvalidError,
    OutOfMemoryError,
    TimedOutError,
    WorkerStoppedError,
    WorkerUnfitError,
)
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.jobs import inference
from rvmcv_worker.model_exports import Choice, Key, ModelExports
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.sandbox import PlainProcess
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace
from tests import lying_engine
from tests.worker_process import eventually

_TIMEOUT_S = 20.0
Make = Callable[..., Engines]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store", 1 << 30)


@pytest.fixture
def model(store: ModelStore, tmp_path: Path) -> str:
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    return store.add(file)


@pytest.fixture
def make(tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return what makes `Engines` whose process lies, by what the `inference` section says."""
    monkeypatch.setattr(engine_process, "CHILD", (sys.executable, str(Path(lying_engine.__file__))))
    monkeypatch.setenv("TZ", "UTC")
    made: list[Engines] = []
    spawner = Spawner()

    def make_engines(**inference: float) -> Engines:
        settings = Settings.model_validate(
            {
                "worker": {"state_dir": tmp_path / "state", "gpu": "none"},
                "inference": {
                    "backend": "torch",
                    "infer_timeout_s": 20.0,
                    "engine_idle_s": 60.0,
                    **inference,
                },
            }
        )
        made.append(
            Engines(
                Machine(
                    settings,
                    PlainProcess(extra_read_only=[Path(lying_engine.__file__)]),
                    spawner,
                    Gpus(settings),
                ),
                store,
            )
        )
        return made[-1]

    yield make_engines
    for engines in made:
        engines.close()
    spawner.close()
    assert not psutil.Process().children(recursive=True)
    assert list((tmp_path / "state" / "work").glob("*")) == []


@pytest.fixture
def ask(model: str) -> Ask:
    return Ask(trust=Trust.OTHER, queue=Queue.INTERACTIVE, model_sha256=model, options=Options())


def _infer(engines: Engines, ask: Ask, does: str) -> dict[str, object]:
    return engines.submit(ask, does.encode()).result(_TIMEOUT_S).result


def test_an_answer_comes_back_as_it_was_given(make: Make, ask: Ask) -> None:
    engines = make()
    assert _infer(engines, ask, "answer") == lying_engine.RESULT
    (status,) = engines.status()
    assert (status.trust, status.state, status.device, status.answered) == ("other", "idle", "cpu", 1)


def test_of_what_crashes_the_engine_beside_others_only_that_fails(make: Make, ask: Ask) -> None:
    engines = make()
    _infer(engines, ask, "answer")
    futures = [engines.submit(ask, does.encode()) for does in ("one", "crash", "two", "three")]
    for index in (0, 2, 3):
        assert futures[index].result(_TIMEOUT_S).result == lying_engine.RESULT
    with pytest.raises(JobCrashedError, match="SIGSEGV") as crash:
        futures[1].result(_TIMEOUT_S)
    assert "illegal instruction,  probably" in crash.value.message
    assert engines.status()[0].replaced == 2  # once beside the others, once alone


@pytest.mark.parametrize("does", ["hang", "hang before"])
def test_of_what_hangs_the_engine_beside_others_only_that_fails(make: Make, ask: Ask, does: str) -> None:
    engines = make(infer_timeout_s=0.5)
    _infer(engines, ask, "answer")
    futures = [engines.submit(ask, what.encode()) for what in (does, "one", "two")]
    assert [future.result(_TIMEOUT_S).result for future in futures[1:]] == [lying_engine.RESULT] * 2
    with pytest.raises(TimedOutError, match=r"0\.5 s"):
        futures[0].result(_TIMEOUT_S)


@pytest.mark.parametrize(
    "does",
    [*lying_engine.LIES, "rubbish", "stranger", "chatter", "fenced", "nested", "picture unasked"],
)
def test_an_engine_that_says_what_is_untrue_is_a_crashed_one(make: Make, ask: Ask, does: str) -> None:
    engines = make()
    with pytest.raises(JobCrashedError):
        _infer(engines, ask, does)
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_texts_of_an_engine_are_made_harmless(make: Make, ask: Ask) -> None:
    engines = make()
    assert _infer(engines, ask, "odd class")["detections"][0]["class"] == "ab"  # type: ignore[index]
    with pytest.raises(ImageInvalidError, match=r"^no  image$"):
        _infer(engines, ask, "no image")
    assert engines.status()[0].replaced == 0


def test_an_engine_that_eats_memory_is_replaced(make: Make, ask: Ask) -> None:
    engines = make(engine_memory_gb=0.05)
    future = engines.submit(ask, b"eat")
    with pytest.raises(OutOfMemoryError, match="engine_memory_gb"):
        future.result(_TIMEOUT_S)
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_an_engine_that_writes_without_end_is_replaced(
    make: Make, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_OWN_FILES_GB", 0.02)
    engines = make()
    future = engines.submit(ask, b"fill")
    with pytest.raises(DiskQuotaError, match="the inference engine filled the disk"):
        future.result(_TIMEOUT_S)
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_a_full_disk_at_an_engines_start_hands_jobs_back(
    make: Make, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    engines = make()
    with monkeypatch.context() as full:
        full.setattr(Workspace, "write_job", no_room)
        with pytest.raises(WorkerUnfitError, match="No space left"):
            _infer(engines, ask, "answer")
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_an_engine_that_does_not_start_fails_what_waits_and_is_tried_again(
    make: Make, ask: Ask, tmp_path: Path
) -> None:
    engines = make()
    _infer(engines, ask, "answer")
    broken = tmp_path / "state" / "work" / "_engine-other" / "in" / "broken"
    broken.touch()
    with pytest.raises(WorkerUnfitError):  # nobody knows whether it would have crashed alone
        _infer(engines, ask, "crash")
    with pytest.raises(WorkerUnfitError, match=r"libtorch\.so"):  # no job's fault
        _infer(engines, ask, "answer")
    broken.unlink()
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_a_batch_keeps_two_images_at_a_cpu_and_two_batches_at_a_gpu(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = make(max_batch=5)
    assert engines.at_once(Trust.OTHER) == 2
    monkeypatch.setattr(Machine, "choose_gpu", lambda _self: 0)
    assert engines.at_once(Trust.OTHER) == 10


def test_engines_and_export_child_together_take_no_more_than_their_part_of_a_gpu(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {"worker": {"state_dir": tmp_path}, "limits": {"engine_gpu_memory_gb": 3.0}}
    )
    gpus = SimpleNamespace(identity=lambda _gpu: SimpleNamespace(memory_total_bytes=24 * 1024**3))
    machine = Machine(settings, PlainProcess(), None, gpus)  # type: ignore[arg-type]
    engine = machine.gpu_memory_fraction(0, engine_process.ENGINE_SHARE)
    export = machine.gpu_memory_fraction(0, engine_process.EXPORT_SHARE)
    assert 24 * (2 * engine + export) == pytest.approx(3.0)
    assert machine.gpu_memory_fraction(None, engine_process.ENGINE_SHARE) == 1.0
    assert machine.embedding_cache_bytes(0) == int(1.2 * 1024**3 / 4)
    assert machine.embedding_cache_bytes(None) == 512 * 1024**2


def test_approved_models_are_measured_before_all_others(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = make(backend="openvino")._exports
    measured: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def measure(_self: EngineExports, key: Key, _gpu: int | None) -> Choice:
        begun.set()
        assert go_on.wait(_TIMEOUT_S)
        measured.append(int(key.model_sha256, 16))
        raise ModelInvalidError("is no checkpoint")

    monkeypatch.setattr(EngineExports, "_measure", measure)
    for model, trust in enumerate([Trust.OTHER, Trust.OTHER, Trust.OTHER, Trust.APPROVED]):
        assert exports.find(exports.key(f"{model:064x}", None, None), None, trust) is None
        assert begun.wait(_TIMEOUT_S)
    go_on.set()
    eventually(lambda: len(measured) == 4)
    assert measured == [0, 3, 1, 2]
    assert exports.find(exports.key("0" * 64, None, None), None, Trust.OTHER) is None
    assert exports._wanted.empty()


def test_an_export_that_crashes_the_engine_as_it_is_loaded_leaves_it_to_torch(
    make: Make, ask: Ask, tmp_path: Path
) -> None:
    engines = make(backend="openvino")
    key = engines._exports.key(ask.model_sha256, None, None)
    network = tmp_path / "model.onnx"
    network.write_bytes(b"a network")
    file = {"name": "model.onnx", "size_bytes": 9, "sha256": hashlib.sha256(b"a network").hexdigest()}
    chosen = {"backend": "openvino", "precision": "fp32"}
    choice = Choice.parse({"chosen": chosen, "files": [file], "measured": {}, "imgsz": 64})
    exports = ModelExports(tmp_path / "state" / "models")
    exports.save(key, choice, lambda _file: network)

    with pytest.raises(JobCrashedError, match="SIGSEGV"):
        _infer(engines, ask, "crash")  # where the image does it, the export is not at fault
    assert exports.find(key) == choice
    with pytest.raises(JobCrashedError, match="SIGSEGV"):
        _infer(engines, ask, "crash with an export")
    eventually(lambda: exports.find(key) is None)
    assert _infer(engines, ask, "crash with an export") == lying_engine.RESULT


def test_a_strangers_model_that_crashes_engines_as_it_is_loaded_is_not_loaded_each_time(
    make: Make, ask: Ask, store: ModelStore, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(b"other weights")
    engines = make()
    with pytest.raises(JobCrashedError, match="SIGSEGV"):
        _infer(engines, ask, "crash as it loads")
    replaced = engines.status()[0].replaced
    with pytest.raises(JobCrashedError, match=r"SIGSEGV(.|\n)*a moment ago"):
        _infer(engines, ask, "answer")
    assert engines.status()[0].replaced == replaced
    assert _infer(engines, dataclasses.replace(ask, model_sha256=store.add(other)), "answer")

    approved = dataclasses.replace(ask, trust=Trust.APPROVED)
    with pytest.raises(JobCrashedError):
        _infer(engines, approved, "crash as it loads")
    assert _infer(engines, approved, "answer") == lying_engine.RESULT


def test_an_idle_engine_is_stopped_and_started_when_it_is_asked_again(make: Make, ask: Ask) -> None:
    engines = make(engine_idle_s=0.2)
    _infer(engines, ask, "answer")
    eventually(lambda: engines.status()[0].state == "stopped")
    assert not psutil.Process().children(recursive=True)
    assert _infer(engines, ask, "answer") == lying_engine.RESULT


def test_each_trust_class_has_a_process_of_its_own(make: Make, ask: Ask, model: str) -> None:
    engines = make()
    approved = Ask(trust=Trust.APPROVED, queue=Queue.BATCH, model_sha256=model, options=Options())
    _infer(engines, approved, "answer")
    with pytest.raises(JobCrashedError):
        _infer(engines, ask, "crash")
    assert {status.trust: status.replaced for status in engines.status()} == {"approved": 0, "other": 2}


def test_a_job_that_is_to_end_waits_for_no_answer_and_is_not_repeated(make: Make, ask: Ask) -> None:
    engines = make(infer_timeout_s=0.5)
    _infer(engines, ask, "answer")
    interrupt = Interrupt()
    interrupt.request(StopReason.CANCELLED)
    with pytest.raises(JobCancelledError):
        engines.infer(ask, b"hang", interrupt=interrupt)
    interrupt.close()
    assert _infer(engines, ask, "answer") == lying_engine.RESULT
    assert engines.status()[0].replaced == 1


def test_a_stop_ends_the_engine_and_what_is_under_way(make: Make, ask: Ask) -> None:
    engines = make()
    future = engines.submit(ask, b"hang")
    eventually(lambda: engines.status()[0].state == "busy")
    engines.close()
    with pytest.raises(WorkerStoppedError):
        future.result(0)
    with pytest.raises(WorkerStoppedError):
        engines.submit(ask, b"answer")


def test_models_over_the_limit_go_and_come_back_when_they_are_asked_for(
    make: Make, store: ModelStore, tmp_path: Path
) -> None:
    engines = make(engine_memory_gb=0.1)
    asks = []
    for index in range(3):
        file = tmp_path / f"large-{index}.pt"
        file.write_bytes(bytes([index]) * 50_000_000)
        asks.append(Ask(Trust.OTHER, Queue.INTERACTIVE, store.add(file), Options()))
    for one in (*asks, asks[0]):
        assert _infer(engines, one, "answer") == lying_engine.RESULT
    placed = tmp_path / "state" / "work" / "_engine-other" / "in" / "models"
    assert {path.stem for path in placed.iterdir()} == {asks[2].model_sha256, asks[0].model_sha256}


@pytest.mark.parametrize(
    ("does", "notes", "has_mask"), [("large masks", 1, True), ("large masks always", 2, False)]
)
def test_without_storage_masks_too_large_for_a_report_become_rle_or_are_left_out(
    make: Make, ask: Ask, does: str, notes: int, has_mask: bool
) -> None:
    engines = make()
    wanted = dataclasses.replace(ask, options=Options(segmentation=True))
    attempt = SimpleNamespace(services=SimpleNamespace(engines=engines), interrupt=Interrupt())
    answer = engines.infer(wanted, does.encode(), interrupt=attempt.interrupt)
    told: list[str] = []
    less = inference._ask_for_less(attempt, wanted, does.encode(), answer, told)  # type: ignore[arg-type]
    assert (len(told), "segmentation" in less.result["detections"][0]) == (notes, has_mask)
    assert not inference._is_too_large(less.result)
    attempt.interrupt.close()
