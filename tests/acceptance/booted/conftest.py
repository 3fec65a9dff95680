"""One booted system for all tests here, with the worker installed in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests import wheelhouse
from tests.booted import Booted
from tests.booted_stage import reference, root
from tests.installed import CONFIG, TOKEN, UNIT, FirstRun, Installed


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
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
