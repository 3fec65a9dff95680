"""From one version to another, back by itself from one that does not get ready, and off the machine again."""

from __future__ import annotations

import pytest

from tests.installed import COMMAND, CONFIG, UNIT, Installed

pytestmark = pytest.mark.slow

_CURRENT = "/opt/rvmcv-worker/current"
#: A daemon that dies when it is to run, and is well in all that the installer tries before.
_DIES = "\n\ndef run(settings):\n    raise SystemExit('the new version has a bug')\n"


def _source(worker: Installed, version: str, *, dies: bool = False) -> str:
    """Put a source tree of another version beside the first; returns where it is."""
    path = f"/root/source-{version}"
    tree = worker.put_source(path)
    for name in ("pyproject.toml", "rvmcv_worker/__init__.py"):
        file = tree / name
        text = file.read_text()
        file.write_text(text.replace(_version(worker), version))
        assert version in file.read_text() or name != "pyproject.toml"
    if dies:
        daemon = tree / "rvmcv_worker/daemon.py"
        daemon.write_text(daemon.read_text() + _DIES)
    return path


def _version(worker: Installed) -> str:
    return worker.machine.ask([COMMAND, "version"])


def test_an_upgrade_that_does_not_get_ready_goes_back_by_itself(worker: Installed) -> None:
    before, text = _version(worker), worker.machine.read(CONFIG)
    job_id = worker.run_until_progress()
    done = worker.install("--without-compute", "--upgrade", source=_source(worker, "9.1.0", dies=True))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the upgrade is taken back: it failed: exit-code, exit status 1" in done.stderr
    assert _version(worker) == before
    assert worker.machine.ask(["readlink", _CURRENT]) == f"releases/{before}"
    assert worker.machine.read(CONFIG) == text
    assert worker.machine.state(UNIT) == "active"
    assert worker.first_error(job_id)["code"] == "worker_stopped"
    worker.server.wait_for_job(job_id, lambda job: job["attempt"] == 2, 40)
    worker.server.cancel(job_id)
    worker.nothing_is_left()


def test_an_upgrade_keeps_settings_and_ledger(worker: Installed) -> None:
    text = worker.machine.read(CONFIG)
    done = worker.install("--without-compute", "--upgrade", source=_source(worker, "9.2.0"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert _version(worker) == "9.2.0"
    assert worker.machine.read(CONFIG) == text
    assert list(worker.machine.inside("/var/lib/rvmcv-worker/backup").glob("ledger-*.sqlite3"))
    worker.wait_well()
    worker.completes(worker.queue())
    assert worker.status()["version"] == "9.2.0"
    worker.nothing_is_left()


def test_a_purge_leaves_nothing(worker: Installed) -> None:
    gone = worker.installer("--uninstall")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert worker.machine.inside(CONFIG).exists()
    assert not worker.machine.inside(_CURRENT).is_symlink()
    assert worker.machine.state(UNIT) == "inactive"
    gone = worker.installer("--purge", "--yes")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    # The drop-in is the admin's own, and the installer holds its lock while it ends.
    found = worker.machine.ask(
        [
            "find",
            "/etc",
            "/opt",
            "/usr",
            "/var/lib",
            "/run",
            "-name",
            "*rvmcv*",
            "!",
            "-path",
            "*.service.d*",
            "!",
            "-name",
            "*.lock",
        ]
    )
    assert found == ""
    assert worker.processes() == []
    assert worker.machine.run(["id", "rvmcv-worker"], check=False).returncode == 1
