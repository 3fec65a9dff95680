"""A compute child as a process of its own, started as the daemon starts it but without the wall."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rvmcv_worker.framing import Decoder

#: Runs a child and writes down each attempt to reach the network or to start another program.
_WATCHED = """
import sys
seen = open(sys.argv.pop(1), "a", buffering=1)
def hook(event, arguments):
    if event in WATCHED:
        seen.write(f"{event} {arguments!r}\\n")
WATCHED = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
           "urllib.Request", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
sys.addaudithook(hook)
import runpy
runpy.run_module("rvmcv_worker.compute.child", run_name="__main__", alter_sys=True)
"""


class ComputeChild:
    """One child: its messages as they come, its result at the end, its log in `<name>.log`."""

    def __init__(
        self, root: Path, name: str, job: dict[str, Any], *, env: dict[str, str] | None = None
    ) -> None:
        self.directory = root / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_file = root / f"{name}.log"
        self.watched_file = root / f"{name}.watched"
        self.received: list[dict[str, Any]] = []
        self._read_fd, write_fd = os.pipe()
        (self.directory / "job.json").write_text(json.dumps({**job, "progress_fd": write_fd}))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WATCHED, str(self.watched_file), name],
                cwd=root,
                pass_fds=[write_fd],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1]), **(env or {})},
            )
        os.close(write_fd)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield each progress message when it comes, until the child closes its pipe."""
        decoder = Decoder()
        try:
            while data := os.read(self._read_fd, 65536):
                for message, _ in decoder.feed(data, time.monotonic()):
                    self.received.append(message)
                    yield message
        finally:
            os.close(self._read_fd)

    def finish(self) -> dict[str, Any]:
        """Read to the end and return `result.json`; what the child printed is in the failure otherwise."""
        for _ in self.messages():
            pass
        return self.result()

    def result(self) -> dict[str, Any]:
        """Wait for the end of the process and return `result.json`."""
        self.process.wait(timeout=120)
        file = self.directory / "result.json"
        assert file.is_file(), f"no result.json; the log ends:\n{self.log_file.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(file.read_text())
        return answer
