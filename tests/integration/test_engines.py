"""The real engine behind the wall, killed and stopped in the middle of what it does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from rvmcv_worker import sandbox
from rvmcv_worker.config import Settings
from rvmcv_worker.engine_answer import Said
from rvmcv_worker.engine_client import Ask, Engines, InferResult
from rvmcv_worker.engine_keeper import EngineKeeper
from rvmcv_worker.engine_process import Machine
from rvmcv_worker.engine_wire import Options, Queue, Stage, Trust
from rvmcv_worker.errors import JobCrashedError, TimedOutError
from rvmcv_worker.gpu import Gpus
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.spawner import Spawner
from tests.worker_process import eventually

_TIMEOUT_S = 60.0
Act = Callable[[signal.Signals], None]


@contextlib.contextmanager
def _engines(state_dir: Path, **inference: object) -> Iterator[Engines]:
    settings = Settings.model_validate(
        {"worker": {"state_dir": state_dir, "gpu": "none"}, "inference": inference}
    )
    spawner = Spawner()
    store = ModelStore(settings.model_store_dir, 1 << 30)
    engines = Engines(Machine(settings, sandbox.choose(settings.sandbox), spawner, Gpus(settings)), store)
    yield engines
    engines.close()
    spawner.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """One for the module: a fresh process costs seconds, and each test also shows that it goes on."""
    state_dir = tmp_path_factory.mktemp("engines")
    with _engines(state_dir, backend="torch", infer_timeout_s=4.0) as engines:
        yield engines


@pytest.fixture(scope="module")
def ask(engines: Engines, shared: Path) -> Ask:
    sha256 = engines.store.add(shared / "models" / "pet_hdpe_yolo11n.pt")
    return Ask(Trust.OTHER, Queue.INTERACTIVE, sha256, Options(imgsz=320))


@pytest.fixture(scope="module")
def images(shared: Path) -> list[bytes]:
    files = sorted((shared / "datasets" / "pet_hdpe_det" / "images" / "val").glob("HDPE*"))[:4]
    return [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def expected(engines: Engines, ask: Ask, images: list[bytes]) -> list[object]:
    """What each image has in it, asked one by one."""
    return [_seen(engines.submit(ask, image)) for image in images]


def _seen(future: Future[InferResult]) -> object:
    return future.result(_TIMEOUT_S).result["detections"]


def _signal_the_engine(signum: signal.Signals) -> None:
    for process in psutil.Process().children(recursive=True):
        if (
            process.cmdline()[-2:] == ["rvmcv_worker.compute.child", "engine"]
            and "bwrap" not in process.name()
        ):
            os.kill(process.pid, signum)


@pytest.fixture
def when_inferred(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, signal.Signals, int], None]:
    """Have the engine's process get a signal whenever it says that it infers in this image."""

    def arrange(image: bytes, signum: signal.Signals, times: int) -> None:
        left = [times]
        take_said = EngineKeeper._take_said

        def watched(self: EngineKeeper, said: Said, payload: bytes) -> None:
            take_said(self, said, payload)
            pending = self._in_flight.get(said.id)
            if pending and pending.image == image and said.stage is Stage.INFER and left[0]:
                left[0] -= 1
                _signal_the_engine(signum)

        monkeypatch.setattr(EngineKeeper, "_take_said", watched)

    return arrange


def test_an_engine_finds_what_is_in_the_pictures(expected: list[object]) -> None:
    assert any(expected)


def test_killed_once_it_is_replaced_and_nothing_is_lost(
    engines: Engines,
    ask: Ask,
    images: list[bytes],
    expected: list[object],
    when_inferred: Callable[..., None],
) -> None:
    when_inferred(images[1], signal.SIGKILL, 1)
    replaced = engines.status()[0].replaced
    assert [_seen(future) for future in [engines.submit(ask, image) for image in images]] == expected
    assert engines.status()[0].replaced == replaced + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "error"), [(signal.SIGKILL, JobCrashedError), (signal.SIGSTOP, TimedOutError)]
)
def test_of_what_ends_or_hangs_it_each_time_beside_others_only_that_fails(
    engines: Engines,
    ask: Ask,
    images: list[bytes],
    expected: list[object],
    when_inferred: Callable[..., None],
    signum: signal.Signals,
    error: type[Exception],
) -> None:
    when_inferred(images[1], signum, 1000)
    futures = [engines.submit(ask, image) for image in images]
    assert [_seen(futures[index]) for index in (0, 2, 3)] == [expected[index] for index in (0, 2, 3)]
    with pytest.raises(error):
        futures[1].result(_TIMEOUT_S)
    assert _seen(engines.submit(ask, images[2])) == expected[2]


@pytest.mark.slow
def test_torch_answers_until_the_fastest_backend_is_known_and_a_restart_knows_it_at_once(
    tmp_path: Path, shared: Path, images: list[bytes]
) -> None:
    with _engines(tmp_path) as engines:
        sha256 = engines.store.add(shared / "models" / "pet_hdpe_yolo11n.pt")
        ask = Ask(Trust.APPROVED, Queue.INTERACTIVE, sha256, Options(imgsz=160))

        def backend(asked: Engines) -> str:
            told: str = asked.submit(ask, images[0]).result(_TIMEOUT_S).result["backend"]
            return told

        assert backend(engines) == "torch-cpu"
        choices = tmp_path / "models" / "exports"
        eventually(lambda: list(choices.glob("*/choice.json")), timeout_s=200)
        (stored,) = choices.glob("*/choice.json")
        chosen = json.loads(stored.read_bytes())["choice"]["chosen"]["backend"]
        eventually(lambda: backend(engines) == chosen)
    with _engines(tmp_path) as engines:
        assert backend(engines) == chosen
