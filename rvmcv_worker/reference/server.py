"""A whole server in this process: the HTTP API, its reaper and its store, each in a thread."""

from __future__ import annotations

import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import uvicorn

from rvmcv_worker.reference.app import make_app
from rvmcv_worker.reference.batches import Batches
from rvmcv_worker.reference.by_hand import ByHand
from rvmcv_worker.reference.database import Clock, Database, database_clock
from rvmcv_worker.reference.datasets import DatasetShelf
from rvmcv_worker.reference.embedded_s3 import EmbeddedS3
from rvmcv_worker.reference.held_answers import HeldAnswers
from rvmcv_worker.reference.models import ModelShelf
from rvmcv_worker.reference.queue import Queue
from rvmcv_worker.reference.reaper import Reaper
from rvmcv_worker.reference.services import Services
from rvmcv_worker.reference.settings import Settings
from rvmcv_worker.reference.state_file import FILE_NAME, State
from rvmcv_worker.reference.states import Ability
from rvmcv_worker.reference.storage import Storage
from rvmcv_worker.reference.tokens import Tokens
from rvmcv_worker.reference.wakeup import Wakeup
from rvmcv_worker.reference.webhook import Webhook

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5


class ReferenceServer(ByHand):
    """Use it as a context manager, or call `start` and `stop`.

    Everything it keeps lies in `data_dir` (a temporary folder when None): a server that is made
    again on the same folder goes on where the last one stopped; give it the same `port` and
    `s3_port` when its clients are to find it again. Servers that share a PostgreSQL also share one
    `lease_key` (64 hex digits) and one store (`s3_endpoint`).
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        settings: Settings | None = None,
        database_url: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        s3_endpoint: str | None = None,
        s3_access_key: str | None = None,
        s3_secret_key: str | None = None,
        s3_port: int = 0,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        lease_key: str | None = None,
        clock: Clock = database_clock,
        s3_clock: Callable[[], float] = time.time,
        reap: bool = True,
    ) -> None:
        if lease_key is not None and not re.fullmatch("[0-9a-f]{64}", lease_key):
            raise ValueError("the lease key must be 64 hex digits: make one by `openssl rand -hex 32`")
        self.settings = settings or Settings()
        if not re.match("https?://.", self.settings.webhook_url or "http://none"):
            raise ValueError(f"the webhook {self.settings.webhook_url!r} must be an http:// or https:// URL")
        self._temporary = None if data_dir else tempfile.TemporaryDirectory(prefix="rvmcv-reference-")
        self.data_dir = data_dir or Path(self._temporary.name if self._temporary else ".")
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database_url = database_url or f"sqlite:///{self.data_dir / 'reference.db'}"
        self._host, self._port, self._s3_port = host, port, s3_port
        self._external_s3 = s3_endpoint
        self._s3_keys = (s3_access_key, s3_secret_key)
        self._tls = (tls_cert, tls_key)
        self._clock, self._s3_clock = clock, s3_clock
        self._lease_key = lease_key
        self._reap = reap

    def start(self) -> ReferenceServer:
        """Listen; returns once requests are answered."""
        earlier = State.load(self.data_dir / FILE_NAME)
        self._database = Database(self._database_url, self._clock)
        self._start_storage(earlier)
        lease_key = self._lease_key or (earlier.lease_key if earlier else secrets.token_hex(32))
        wakeup = Wakeup(self._database.postgres_url)
        self._queue = Queue(self._database, self.settings, wakeup, bytes.fromhex(lease_key))
        models = ModelShelf(self._queue, self._storage)
        self._services = Services(
            settings=self.settings,
            queue=self._queue,
            storage=self._storage,
            models=models,
            datasets=DatasetShelf(self._queue, self._storage),
            tokens=Tokens(self._queue),
            batches=Batches(self._queue, self._storage, models, self.settings),
            held=HeldAnswers(self._queue, self.settings.held_answers_limit),
        )
        self._start_http()
        self.state = State(
            url=self.url,
            worker_token=self._token(earlier.worker_token if earlier else None, Ability.WORKER),
            admin_token=self._token(earlier.admin_token if earlier else None, Ability.ADMIN),
            edge_token=self._token(earlier.edge_token if earlier else None, Ability.EDGE),
            s3_endpoint=self._storage.endpoint,
            s3_access_key=self._storage.access_key,
            s3_secret_key=self._storage.secret_key,
            lease_key=lease_key,
        )
        self.state.save(self.data_dir / FILE_NAME)
        self._reaper = Reaper(self._queue, self.settings.timing.reap_every_s)
        if self._reap:
            self._reaper.start()
        url = self.settings.webhook_url
        self._webhook = Webhook(self._queue, self.settings, url) if url else None
        if self._webhook is not None:
            self._webhook.start()
        return self

    def stop(self) -> None:
        """Let held polls go, finish what runs, and close every port."""
        self._queue.wakeup.close()
        if self._reap:
            self._reaper.stop()
        if self._webhook is not None:
            self._webhook.stop()
        self._http.should_exit = True
        self._http_thread.join()
        self._storage.close()
        if self._embedded_s3 is not None:
            self._embedded_s3.stop()
        self._database.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> ReferenceServer:
        """Start."""
        return self.start()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def s3_endpoint(self) -> str:
        """Return the store's address, with its scheme."""
        return self.state.s3_endpoint

    @property
    def s3_access_key(self) -> str:
        """Return the name of the store's one user."""
        return self.state.s3_access_key

    @property
    def s3_secret_key(self) -> str:
        """Return that user's secret."""
        return self.state.s3_secret_key

    @property
    def worker_token(self) -> str:
        """Return a token with the ability `worker`."""
        return self.state.worker_token

    @property
    def admin_token(self) -> str:
        """Return a token with the ability `admin`."""
        return self.state.admin_token

    @property
    def edge_token(self) -> str:
        """Return a token with the ability `edge`."""
        return self.state.edge_token

    def _start_storage(self, earlier: State | None) -> None:
        access_key, secret_key = self._s3_keys
        if earlier is not None:
            access_key = access_key or earlier.s3_access_key
            secret_key = secret_key or earlier.s3_secret_key
        self._embedded_s3 = None
        endpoint = self._external_s3
        if endpoint is None:
            self._embedded_s3 = EmbeddedS3(
                self.data_dir / "s3",
                access_key=access_key,
                secret_key=secret_key,
                host=self._host,
                port=self._s3_port,
                clock=self._s3_clock,
            )
            endpoint = self._embedded_s3.endpoint
            access_key, secret_key = self._embedded_s3.access_key, self._embedded_s3.secret_key
        if not access_key or not secret_key:
            raise ValueError("a store of your own needs its access key and its secret key")
        self._storage = Storage(endpoint, access_key, secret_key)

    def _start_http(self) -> None:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # asyncio switches Nagle's algorithm off only where the protocol is named; with it on, an
        # answer whose head and body are two packets waits 40 ms for the client's delayed ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self._port))
        cert, key = self._tls
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{'https' if cert else 'http'}://{host}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            make_app(self._services),
            log_level="warning",
            access_log=False,
            ssl_certfile=cert,
            ssl_keyfile=key,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        self._http = _HttpServer(config)
        self._http_thread = threading.Thread(
            target=self._http.run, args=([listener],), name="reference-http", daemon=True
        )
        self._http_thread.start()
        if not self._http.listening.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the HTTP server did not start within {START_TIMEOUT_S} s")

    def _token(self, earlier: str | None, ability: Ability) -> str:
        if earlier and self._services.tokens.caller(earlier):
            return earlier
        return self._services.tokens.make(ability.value, [ability])


class _HttpServer(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()
