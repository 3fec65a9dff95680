"""The bearer token, which may change while the worker runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from rvmcv_worker import logs
from rvmcv_worker.config import ConfigError, Settings, load_credentials


@dataclass(frozen=True)
class Reading:
    """What reading the token again has brought."""

    changed: bool = False  #: it is another one than before
    fault: str | None = None  #: why it could not be read; the one before stays in force

    def __str__(self) -> str:
        if self.fault:
            return f"the token could not be read again, the one before stays in force: {self.fault}"
        return f"the token was read again: {'a new one' if self.changed else 'the same'}"


class TokenSource:
    """Keeps the token as last read; `reload` reads it again, from wherever the credentials are."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._token = load_credentials(settings).token
        logs.mask(self._token.get_secret_value())

    def value(self) -> str:
        """Return the token itself: for the `Authorization` header and nothing else."""
        return self._token.get_secret_value()

    def reload(self) -> Reading:
        """Read the token again.

        A file that has just become unreadable or empty, as in the middle of its replacement, keeps
        the old token in force.
        """
        try:
            token = load_credentials(self._settings).token
        except ConfigError as error:
            return Reading(fault=str(error))
        logs.mask(token.get_secret_value())
        with self._lock:
            changed = token.get_secret_value() != self._token.get_secret_value()
            self._token = token
        return Reading(changed=changed)
