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

from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.health import FILE_NAME, socket_path

#: How long the worker may take to answer, in seconds; it makes no network call for it.
_ANSWER_S = 10.0
#: Seconds between two looks while something is waited for.
_LOOK_S = 0.2


class ControlError(Exception):
    """The worker was not reached, or did not do it; the message says what to do."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


class ControlClient:
    """Talks to the worker whose runtime directory it is."""

    def __init__(self, runtime_dir: Path) -> None:
        self._file = runtime_dir / FILE_NAME

    def status(self) -> dict[str, Any]:
        """Return how the worker is. Raises `ControlError`."""
        return self._call("GET", "/status")

    def tell(self, name: str) -> dict[str, Any]:
        """Ask for ``drain``, ``pause`` or ``resume``. Raises `ControlError`."""
        return self._call("POST", f"/control/{name}")

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
            if not (status["running"] or status["claiming"] or status["outbox"]):
                return status
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise ControlError(
                    f"not within {timeout_s:g} s; the wish still holds: {wish}", ExitCode.TIMED_OUT
                )
            look.wait(_LOOK_S)

    def _call(self, method: str, path: str) -> dict[str, Any]:
        connection = _UnixConnection(self._file)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = json.loads(answer.read() or b"{}")
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
        if answer.status == 200:
            return dict(body)
        code = ExitCode.NOT_ALLOWED if answer.status == 403 else ExitCode.FAILED
        raise ControlError(str(body.get("error", f"the worker answered {answer.status}")), code)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP to a unix socket."""

    def __init__(self, file: Path) -> None:
        super().__init__("localhost", timeout=_ANSWER_S)
        self._file = file

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_ANSWER_S)
        with socket_path(self._file) as path:
            self.sock.connect(path)
