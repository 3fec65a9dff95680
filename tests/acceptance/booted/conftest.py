"""One booted system for all tests here, with the worker installed in it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Settings, Timing
from tests import debian_root, wheelhouse
from tests.booted import Booted
from tests.installed import CONFIG, TOKEN, UNIT, FirstRun, Installed

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


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstRun]:
    """A system in which `install.sh` has run once, without what trains."""
    directory = tmp_path_factory.mktemp("booted")
    try:
        with Booted(root(directory)) as machine, reference(machine, directory) as server:
            worker = Installed(machine, server, wheelhouse.cached())
            done = worker.install("--without-compute")
            yield FirstRun(worker, done.returncode, done.stdout + done.stderr)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def quick(first: FirstRun) -> Installed:
    """The worker with short waits; every test leaves configuration and token as they are here."""
    first.worker.make_quick()
    return first.worker


@pytest.fixture
def worker(quick: Installed) -> Iterator[Installed]:
    """The worker, ready; afterwards its configuration, token and unit are what they were."""
    machine = quick.machine
    kept = {path: machine.read(path) for path in (CONFIG, TOKEN)}
    machine.run(["systemctl", "reset-failed"])
    if machine.state(UNIT) != "active":
        quick.systemctl("start")
    quick.wait_well()
    yield quick
    for path, text in kept.items():
        if machine.inside(path).exists() and machine.read(path) != text:
            machine.write(path, text, 0o600 if path == TOKEN else 0o644)
            quick.systemctl("stop")
    if machine.inside(CONFIG).exists():
        machine.run(["systemctl", "reset-failed"])
        quick.systemctl("start")
