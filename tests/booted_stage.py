"""What a booted system is tried on: a root of its own, and the server on its one wire."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests import debian_root
from tests.booted import Booted

#: The Python of the release that is booted: a wheelhouse fits one.
_PYTHON = (3, 11)


def root(directory: Path) -> Path:
    """Return a root to boot; skips where that cannot be."""
    if sys.version_info[:2] != _PYTHON:
        pytest.skip(
            "the wheels are for the Python that runs the tests, and Debian 12 has 3.11: run them by that"
        )
    try:
        return debian_root.copy(debian_root.cached(), directory / "root")
    except debian_root.RootMissingError as error:
        pytest.skip(str(error))


def reference(machine: Booted, directory: Path) -> ReferenceServer:
    """Return the server on this end of the machine's one wire, not yet started."""
    settings = Settings(timing=Timing(report_interval_s=1.0, hand_back_delay_s=0.1, reap_every_s=0.1))
    return ReferenceServer(directory / "server", host=machine.host_address, settings=settings)
