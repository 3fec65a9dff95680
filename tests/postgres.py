"""A PostgreSQL from Debian's packages, started as an ordinary user in a temporary directory."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psycopg

_BIN = max(
    Path("/usr/lib/postgresql").glob("*/bin/initdb"),
    key=lambda path: int(re.sub(r"\D", "", path.parts[-3]) or 0),
    default=Path(shutil.which("initdb") or "/nonexistent/initdb"),
).parent
#: Why there is none; empty where there is one.
MISSING = "" if (_BIN / "initdb").exists() else "PostgreSQL is not installed: sudo apt install postgresql"
#: PostgreSQL refuses to run as root.
_ORDINARY_USER = "nobody"
_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "deadlock_timeout": "100ms",
}


class Postgres:
    """Runs from `__enter__` to `__exit__`, reached by a unix socket alone; nothing of it stays.

    `durable` leaves its writes as safe as in production: tests need not wait for the disk.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._options = {"listen_addresses": "", "max_connections": "200"} if durable else _OPTIONS
        self._numbers = itertools.count(1)

    def __enter__(self) -> Postgres:
        """Make the cluster and start it."""
        # Not in pytest's directories, which others may not enter; and a socket's path must be short.
        self._directory = tempfile.mkdtemp(prefix="rvmcv-pg-")
        if os.geteuid() == 0:
            shutil.chown(self._directory, _ORDINARY_USER)
        try:
            self._call("initdb", "-A", "trust", "-U", "rvmcv", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
            options = {**self._options, "unix_socket_directories": self._directory}
            settings = " ".join(f"-c {name}='{value}'" for name, value in options.items())
            self._call("pg_ctl", "start", "-w", "-l", f"{self._directory}/log", "-o", settings)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stop it, whoever is still connected, and remove it."""
        self._call("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(self._directory)

    def new_database(self) -> str:
        """Make an empty database and return SQLAlchemy's URL of it."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://rvmcv@/{database}?host={self._directory}"

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(_BIN / program), "-D", f"{self._directory}/data", *arguments]
        if os.geteuid() == 0:
            user = pwd.getpwnam(_ORDINARY_USER)
            privileges = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            command = ["setpriv", *privileges, *command]
        # To a file: the server inherits it, and a pipe would stay open for as long as that runs.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd="/", check=False)
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"{program} ended with {done.returncode}: {output.read()}")
