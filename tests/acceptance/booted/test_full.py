"""A training with everything in an installed service: `make acceptance-full`, since it fetches gigabytes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from rvmcv_worker.demo.drawing import draw_zip
from tests import wheelhouse
from tests.booted import Booted
from tests.booted_stage import reference, root
from tests.installed import CONFIG, Installed
from tests.training_jobs import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RVMCV_ACCEPTANCE_FULL" not in os.environ, reason="make acceptance-full runs it"),
]


def test_a_training_runs_in_the_installed_service(tmp_path: Path) -> None:
    archive = draw_zip(tmp_path / "drawn.zip", train=16, val=8, test=4, size_px=96, seed=1)
    try:
        with Booted(root(tmp_path)) as machine, reference(machine, tmp_path) as server:
            worker = Installed(machine, server, wheelhouse.cached("compute"))
            machine.write("/root/access-key", server.s3_access_key, 0o600)
            machine.write("/root/secret-key", server.s3_secret_key, 0o600)
            keys = ("--s3-access-key-file", "/root/access-key", "--s3-secret-key-file", "/root/secret-key")
            done = worker.install(*keys)
            assert done.returncode == 0, done.stdout + done.stderr
            python = "/opt/rvmcv-worker/current/bin/python"
            assert machine.ask([python, "-c", "import cv2; print(cv2.__version__)"])
            text = machine.read(CONFIG)
            assert "yolo11" in text
            text = text.replace("[storage]", f'[storage]\ns3_endpoint = "{server.s3_endpoint}"')
            machine.write(CONFIG, text)
            worker.make_quick()
            worker.wait_well()
            sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
            url = server.put_object("datasets", "drawn.zip", archive)
            job_id = server.queue_training({**SMALL, "dataset_url": url, "dataset_sha256": sha256})
            worker.completes(job_id, within_s=600)
            assert [
                model for model in server.models() if model["training_job_id"] == server.job(job_id)["id"]
            ]
            worker.nothing_is_left()
    finally:
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
