"""The commands' end of the worker's unix socket: ask, tell, wait."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.socket_file import FILE_NAME, socket_path

#: How long the worker may take to answer, in seconds; it makes no network call for it.
ANSWER_S = 10.0
#: Seconds between two tries to connect where too many wait for the worker to accept them.
_FULL_S = 0.05
#: Seconds between two looks while something is waited for.
_LOOK_S = 0.2


_LOOK_AT_IT = "look at its log (journalctl), then restart it"
#: Of a wish whose answer did not come.
_WHETHER = ", and whether it follows is not known: once it answers again, `rvmcv-worker status` says so"


class ControlError(Exception):
    """The worker was not reached, or did not do it; the message says what to do."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


class UnknownJobError(ControlError):
    """The worker has nothing to say of the job any more, or never had."""


class ControlClient:
    """Talks to the worker whose runtime directory it is."""

    def __init__(self, runtime_dir: Path, *, answer_s: float = ANSWER_S) -> None:
        self._file = runtime_dir / FILE_NAME
        self._answer_s = answer_s

    def status(self) -> dict[str, Any]:
        """Return how the worker is. Raises `ControlError`."""
        return self._call("GET", "/status")

    def tell(self, name: str) -> dict[str, Any]:
        """Ask for ``drain``, ``pause``, ``resume`` or ``wipe-store``. Raises `ControlError`."""
        return self._call("POST", f"/control/{name}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Have a running job end as cancelled. Raises `ControlError`."""
        return self._call("POST", f"/control/cancel/{quote(job_id, safe='')}")

    def job(self, job_id: str) -> dict[str, Any]:
        """Return how a job stands here: ``running``, ``reporting``, ``over``. Raises `ControlError`."""
        return self._call("GET", f"/jobs/{quote(job_id, safe='')}")

    def log(self, job_id: str, offset: int) -> dict[str, Any]:
        """Return some of a job's last lines, from one of them on. Raises `ControlError`."""
        return self._call("GET", f"/jobs/{quote(job_id, safe='')}/log?offset={offset}")

    def wait_over(self, job_id: str, timeout_s: float | None) -> str | None:
        """Wait until a job that ran is over, wiped and reported; returns how it ended, where that is known.

        Raises `ControlError`.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        look = threading.Event()
        while True:
            try:
                job = self.job(job_id)
            except UnknownJobError:  # so many have ended after it
                return None
            if job["state"] == "over":
                return str(job["status"])
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise ControlError(
                    f"not within {timeout_s:g} s: {job_id} is {job['state']}", ExitCode.TIMED_OUT
                )
            look.wait(_LOOK_S)

    def wait_idle(
        self, wish: str, timeout_s: float | None, seen: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Wait until nothing runs and every final report is delivered; `seen` gets each status on the way.

        Raises `ControlError`, also when somebody takes the `wish` back meanwhile.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        look = threading.Event()
        while True:
            status = self.status()
            seen(status)
            if status["desired"]["operator"] != wish:
                other = status["desired"]["operator"]
                raise ControlError(f"not waited for: the operator's wish is now {other}", ExitCode.FAILED)
            if not status["running"] and status["claiming"] == status["outbox"] == 0:
                return status
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise ControlError(
                    f"not within {timeout_s:g} s; the wish still holds: {wish}", ExitCode.TIMED_OUT
                )
            look.wait(_LOOK_S)

    def _call(self, method: str, path: str) -> dict[str, Any]:
        connection = _UnixConnection(self._file, self._answer_s)
        try:
            status, text = self._ask(connection, method, path)
            body = json.loads(text or b"{}")
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"the worker does not run: nobody listens on {self._file}; start it, or name its"
                " configuration by --config",
                ExitCode.NOT_RUNNING,
            ) from None
        except PermissionError:
            raise ControlError(
                f"not allowed to use {self._file}: run as root or as the worker's user", ExitCode.NOT_ALLOWED
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ControlError(
                f"{self._file}: no answer that makes sense: {error}", ExitCode.FAILED
            ) from None
        finally:
            connection.close()
        if status == 200:
            return dict(body)
        code = ExitCode.NOT_ALLOWED if status == 403 else ExitCode.FAILED
        if status == 404 and path.startswith("/jobs/"):
            raise UnknownJobError(str(body.get("error", "no such job")), code)
        raise ControlError(str(body.get("error", f"the worker answered {status}")), code)

    def _ask(self, connection: _UnixConnection, method: str, path: str) -> tuple[int, bytes]:
        """Return status and body; raises `ControlError` for a worker that hangs."""
        asked = "how it is" if path == "/status" else f"for {' '.join(path.split('/')[2:])}"
        try:
            connection.connect()
        except (TimeoutError, BlockingIOError):
            raise ControlError(
                f"{self._file}: the worker took no connection within {self._answer_s:g} s, so it was not"
                f" asked {asked}: it hangs; {_LOOK_AT_IT}",
                ExitCode.TIMED_OUT,
            ) from None
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError:
            raise ControlError(
                f"{self._file}: the worker was asked {asked} and said nothing for {self._answer_s:g} s: it"
                f" hangs{'' if method == 'GET' else _WHETHER}; {_LOOK_AT_IT}",
                ExitCode.TIMED_OUT,
            ) from None


class _UnixConnection(http.client.HTTPConnection):
    """HTTP to a unix socket."""

    def __init__(self, file: Path, answer_s: float) -> None:
        super().__init__("localhost", timeout=answer_s)
        self._file = file
        self._answer_s = answer_s

    def connect(self) -> None:
        """Connect; while the kernel keeps no more who wait for the worker, again and again."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._answer_s)
        deadline_s = time.monotonic() + self._answer_s
        with socket_path(self._file) as path:
            while True:
                try:
                    self.sock.connect(path)
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        raise
                    time.sleep(_FULL_S)  # nothing tells when there is room
                else:
                    return
