"""The metrics file in the hardened unit: what docs/metrics.md has ops do is what it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.installed import CONFIG, UNIT, Installed
from tests.worker_process import eventually

pytestmark = pytest.mark.slow

_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
_DROP_IN = f"/etc/systemd/system/{UNIT}.d/zz-metrics.conf"


def test_the_file_is_written_once_the_unit_lets_it(worker: Installed) -> None:
    machine, page = worker.machine, _PAGE.read_text()
    (setting,) = re.findall(r'^metrics_file = ".+"$', page, re.MULTILINE)
    (drop_in,) = re.findall(r"```ini\n(.+?)```", page, re.DOTALL)
    file = Path(setting.split('"')[1])
    start = machine.cursor()
    machine.run(["install", "-d", "-g", "rvmcv-worker", "-m", "0775", str(file.parent)])
    machine.write(CONFIG, re.sub(r"(?m)^# metrics_file = .*$", setting, machine.read(CONFIG)))
    worker.systemctl("restart")
    told = worker.wait_event("metrics.unwritten", after=start)
    assert "Read-only file system" in told["MESSAGE"]
    worker.wait_well()  # it works without
    try:
        machine.write(_DROP_IN, drop_in)
        machine.run(["systemctl", "daemon-reload"])
        worker.systemctl("restart")
        eventually(lambda: machine.run(["test", "-e", str(file)], check=False).returncode == 0)
        seen = machine.run(["setpriv", "--reuid", "nobody", "--clear-groups", "cat", str(file)]).stdout
        assert "rvmcv_worker_info{" in seen
        worker.systemctl("stop")
        assert machine.run(["ls", "-A", str(file.parent)]).stdout == ""
    finally:
        machine.run(["rm", "-f", _DROP_IN])
        machine.run(["systemctl", "daemon-reload"])
