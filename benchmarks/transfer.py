"""A large file down and up through the worker's storage code, hashing included, against `curl`.

For each row `curl` does the same work: an upload with keys signs its payload, and a file whose sha256 has
to be declared first is hashed by `sha256sum`.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import file_peer
from benchmarks.figures import Figure
from rvmcv_worker.config import ServerSettings, Settings, StorageSettings, WorkerSettings, load_credentials
from rvmcv_worker.controller import Controller
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.storage import Storage
from rvmcv_worker.token_source import TokenSource

SIZE_MB, ROUNDS = 200, 9
_INSTANCE = "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11"
_SIGN = ("--aws-sigv4", "aws:amz:us-east-1:s3", "--user", "key:secret")


def measure() -> list[Figure]:
    """Take turns with curl, so that both meet the machine alike; the medians count."""
    with tempfile.TemporaryDirectory(prefix="rvmcv-transfer-") as name:
        directory = Path(name)
        file, arrived = directory / "file", directory / "arrived"
        file.write_bytes(random.Random(7).randbytes(SIZE_MB * 1_000_000))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        with file_peer.serving(file) as url, contextlib.closing(Interrupt()) as interrupt:
            keys, slots = _storage(directory, url, with_keys=True), _storage(directory, url, with_keys=False)

            def fetch() -> None:
                arrived.unlink(missing_ok=True)
                keys.fetch(f"{url}/file", arrived, max_bytes=10**9, sha256=None, interrupt=interrupt)

            def put(storage: Storage, known: str | None = None) -> None:
                stored = storage.put_artifact(
                    file, "a", job_id="j", attempt=1, lease_token="t", interrupt=interrupt, sha256=known
                )
                assert stored.sha256 == sha256

            def curl(*arguments: str) -> None:
                _run("curl", "--silent", "--fail", *arguments)

            def curl_down() -> None:
                arrived.unlink(missing_ok=True)
                curl("--output", str(arrived), f"{url}/file")

            def curl_up() -> None:
                curl("--upload-file", str(file), f"{url}/slot")

            def curl_signed() -> None:
                curl(*_SIGN, "--request", "PUT", "--data-binary", f"@{file}", f"{url}/models/k")

            def curl_hashed() -> None:
                _run("sha256sum", str(file))
                curl_up()

            figures = [
                _paired("download", fetch, "curl", curl_down),
                _paired("upload with keys", lambda: put(keys), "curl --aws-sigv4", curl_signed),
                _paired("upload with keys, curl's unsigned", lambda: put(keys), "curl", curl_up, goal=""),
                _paired("upload into a slot", lambda: put(slots), "sha256sum, curl", curl_hashed),
                _paired("upload into a slot, sha256 known", lambda: put(slots, sha256), "curl", curl_up),
            ]
            keys.close()
            slots.close()
    return figures


def _paired(
    what: str, ours: Callable[[], None], peer: str, peers: Callable[[], None], goal: str = ">= 0.8 x"
) -> Figure:
    ours_s, peers_s = [], []
    for _ in range(ROUNDS):
        ours_s.append(_seconds(ours))
        peers_s.append(_seconds(peers))
    ours_mb_s, peers_mb_s = (SIZE_MB / statistics.median(taken) for taken in (ours_s, peers_s))
    return Figure(f"{what}, {SIZE_MB} MB", ours_mb_s, "MB/s", goal, peer, peers_mb_s)


def _seconds(call: Callable[[], None]) -> float:
    start_s = time.monotonic()
    call()
    return time.monotonic() - start_s


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _storage(directory: Path, url: str, *, with_keys: bool) -> Storage:
    credentials = directory / f"keys-{with_keys}"
    credentials.mkdir()
    for name in ("token", "s3-access-key", "s3-secret-key")[: 3 if with_keys else 1]:
        (credentials / name).write_text("benchmark")
    settings = Settings(
        server=ServerSettings(url=url),
        worker=WorkerSettings(credentials_dir=credentials, runtime_dir=directory),
        storage=StorageSettings(s3_endpoint=url),
    )
    controller = Controller(settings, TokenSource(settings), _INSTANCE)
    return Storage(settings, load_credentials(settings), controller)
