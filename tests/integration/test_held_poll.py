"""A held poll and a wish that comes meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rvmcv_worker.config import SandboxSettings, ServerSettings, Settings, WorkerSettings
from rvmcv_worker.controller import Offers, PollAbandonedError
from rvmcv_worker.daemon import make_services
from rvmcv_worker.protocol import DesiredState
from tests.file_server import FileServer, Handler, status


def test_a_pause_cuts_the_held_poll_and_the_lane_may_poll_again(tmp_path: Path) -> None:
    held = threading.Event()

    def hold(handler: Handler) -> None:
        held.set()
        handler.hold()

    (tmp_path / "token").write_text("a-token")
    (tmp_path / "work").mkdir()
    with FileServer() as server, ThreadPoolExecutor(1) as lane:
        server.on("/api/v1/cv/job-status", hold, status(204))
        services = make_services(
            Settings(
                server=ServerSettings(url=server.url),
                worker=WorkerSettings(state_dir=tmp_path, runtime_dir=tmp_path, credentials_dir=tmp_path),
                sandbox=SandboxSettings(mode="auto"),
            )
        )

        def poll() -> Offers:
            return services.controller.offer("train", slots=1, gpus_free=0, job_types=["stub"], wait_s=30)

        waiting = lane.submit(poll)
        assert held.wait(20)
        services.condition.wish(DesiredState.PAUSE)
        with pytest.raises(PollAbandonedError):
            waiting.result(20)
        assert not server.held_out, "it ended only when the server let go"
        services.condition.wish(DesiredState.RUN)
        assert lane.submit(poll).result(20).jobs == ()
        lane.submit(services.controller.close).result(20)
        services.spawner.close()
        services.ledger.close()
