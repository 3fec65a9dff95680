"""The bearer token, which may change while the worker runs."""

from __future__ import annotations

import threading

from rvmcv_worker import logs
from rvmcv_worker.config import ConfigError, Settings, load_credentials


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

    def reload(self) -> bool:
        """Read the token again; True when it is another one than before.

        A file that has just become unreadable or empty, as in the middle of its replacement, keeps
        the old token in force.
        """
        try:
            token = load_credentials(self._settings).token
        except ConfigError:
            return False
        logs.mask(token.get_secret_value())
        with self._lock:
            changed = token.get_secret_value() != self._token.get_secret_value()
            self._token = token
        return changed
