"""A daemon whose server answers rubbish, and decoders fed with damaged pictures: both in real processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fault_stage import open_stage
from tests.fuzzing import MINUTES, TARGETS, damage, spoil
from tests.network_faults import Answer, Visit
from tests.worker_process import eventually

#: Seed of the dice; another one by hand looks elsewhere.
SEED = 20260109
#: Rubbish answers to each kind of request, more than half of them JSON of nearly the right form.
ROUNDS = max(150, int(MINUTES * 400))


class _Rubbish:
    """Answers each request with something that is nearly what it should be."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.numbers = itertools.count()

    def _good(self, kind: str) -> dict[str, object]:
        offered = {"job_id": f"fuzz-{next(self.numbers)}", "id": 1, "job_type": "stub", "priority": 0}
        return {
            "offer": {"jobs": [{**offered, "config": {"steps": 1, "step_s": 0.01}}]},
            "claim": {
                "lease_token": "t",
                "attempt": 1,
                "lease_s": 60,
                "report_interval_s": 2,
                "resume": {"url": "/a", "sha256": "0" * 64, "epoch": 1},
            },
            "progress": {"directive": "continue"},
            "finish": {"accepted": True},
            "worker-status": {
                "leases": {"fuzz-1": "ok"},
                "desired_state": "run",
                "interval_s": {"idle": 10, "busy": 3},
            },
        }[kind]

    def __call__(self, visit: Visit) -> None:
        dice = self.dice
        good = self._good(visit.request.kind)
        body = json.dumps(spoil(good, dice) if dice.random() < 0.7 else good).encode()
        if dice.random() < 0.2:
            body = damage(body, dice)
        if dice.random() < 0.1:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\n\r\n".encode()
            with contextlib.suppress(OSError):
                visit.connection.sendall(damage(head, dice) + body)
            return
        visit.reply(Answer(dice.choice([200, 200, 200, 200, 200, 201, 204, 404, 409, 422, 500, 302]), body))


@pytest.mark.slow
def test_a_daemon_lives_through_a_server_that_answers_rubbish(tmp_path: Path) -> None:
    kinds = ("offer", "claim", "progress", "finish", "worker-status")
    with open_stage(tmp_path, scale=0.002) as stage:
        rule = stage.network.on(kinds, _Rubbish(SEED), times=ROUNDS)
        # Rubbish may be an order to be quiet for long: then there is less of it.
        until_s = time.monotonic() + 8 + 10 * MINUTES
        eventually(lambda: rule.taken >= ROUNDS or time.monotonic() > until_s, 60 + 60 * MINUTES)
        assert rule.taken > 20
        seen = {request.kind for request in stage.network.requests}
        assert {"offer", "claim", "finish", "worker-status"} <= seen, (
            "some of the rubbish was taken for a job"
        )
        rule.release()
        stage.the_next_job_completes()
        log = stage.worker.log()
        assert "Traceback" not in log
        assert "a fault of the worker's own" not in log


def test_decoders_fed_with_damaged_pictures_end_in_a_picture_or_a_refusal(tmp_path: Path) -> None:
    seconds = max(1.5, MINUTES * 60 / TARGETS)
    fed = subprocess.run(
        [sys.executable, "-m", "tests.image_fuzzing", str(seconds), str(SEED)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 60,
    )
    assert fed.returncode == 0, f"{fed.returncode}: {fed.stderr[-2000:]}; the picture lies in {tmp_path}"
    count, taken = map(int, fed.stdout.split())
    assert count > taken > 0
