"""The files in systemd/: nothing that systemd 249 does not know, nothing that systemd 252 finds wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rvmcv_worker import config
from rvmcv_worker.exit_codes import ExitCode

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
WORKER = UNITS / "rvmcv-worker.service"
#: Ubuntu 22.04 has this one.
OLDEST = 249

#: The version of systemd that brought each directive we use, as its NEWS and manual tell; 0: one before 200.
SINCE = {
    **dict.fromkeys(
        (
            *("Description", "Wants", "After", "Before", "Conflicts", "OnFailure", "WantedBy", "Type"),
            *("NotifyAccess", "ExecStart", "ExecStartPre", "ExecReload", "WatchdogSec", "TimeoutStartSec"),
            *(
                "TimeoutStopSec",
                "KillMode",
                "Restart",
                "RestartSec",
                "RestartPreventExitStatus",
                "User",
                "Group",
            ),
            *("UMask", "LimitNOFILE", "LimitCORE", "Nice", "NoNewPrivileges", "CapabilityBoundingSet"),
            *("PrivateTmp", "PrivateNetwork", "SystemCallFilter", "OnBootSec"),
            *("OnUnitInactiveSec", "RefuseManualStart"),
        ),
        0,
    ),
    "RequiresMountsFor": 201,
    "DeviceAllow": 208,
    "DevicePolicy": 208,
    "PrivateDevices": 209,
    "SystemCallArchitectures": 209,
    "SystemCallErrorNumber": 209,
    "RestrictAddressFamilies": 211,
    "RuntimeDirectory": 211,
    "RuntimeDirectoryMode": 211,
    "ProtectHome": 214,
    "ProtectSystem": 214,
    "TasksMax": 227,
    "AmbientCapabilities": 229,
    "RandomizedDelaySec": 229,
    "IOWeight": 230,
    "StartLimitBurst": 230,
    "StartLimitIntervalSec": 230,
    "InaccessiblePaths": 231,
    "MemoryDenyWriteExecute": 231,
    "MemoryMax": 231,
    "ReadWritePaths": 231,
    "RestrictRealtime": 231,
    "CPUWeight": 232,
    "PrivateUsers": 232,
    "ProtectControlGroups": 232,
    "ProtectKernelModules": 232,
    "ProtectKernelTunables": 232,
    "RemoveIPC": 232,
    "BindPaths": 233,
    "RestrictNamespaces": 233,
    "KeyringMode": 235,
    "LockPersonality": 235,
    "RuntimeDirectoryPreserve": 235,
    "StateDirectory": 235,
    "StateDirectoryMode": 235,
    "PrivateMounts": 239,
    "ProtectHostname": 242,
    "RestrictSUIDSGID": 242,
    "OOMPolicy": 243,
    "TimeoutAbortSec": 243,
    "ProtectKernelLogs": 244,
    "ProtectClock": 245,
    "LoadCredential": 247,
    "ProcSubset": 247,
    "ProtectProc": 247,
    "SetCredential": 247,
    "PrivateIPC": 248,
}


def directives(unit: Path) -> list[tuple[str, str]]:
    lines = [line for line in unit.read_text().splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def values(unit: Path, name: str) -> list[str]:
    return [value for each, value in directives(unit) if each == name]


def analyze(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask about copies of the units whose programs are there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here: apt install systemd")
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/rvmcv-worker/current/bin/rvmcv-worker", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("unit", [*SERVICES, *UNITS.glob("*.timer")], ids=lambda unit: unit.name)
def test_no_directive_is_newer_than_the_oldest_systemd(unit: Path) -> None:
    used = {name for name, _ in directives(unit)}
    assert used <= set(SINCE), f"look up since when there is {sorted(used - set(SINCE))}"
    assert max(SINCE[name] for name in used) <= OLDEST


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    names = [unit.name for unit in (*SERVICES, *UNITS.glob("*.timer"))]
    done = analyze(tmp_path, "verify", "--man=no", *(f"./{name}" for name in names))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_exposure_is_small(tmp_path: Path, unit: Path) -> None:
    done = analyze(tmp_path, "security", "--offline=true", "--no-pager", "--threshold=23", f"./{unit.name}")
    if "--offline" in done.stderr:
        pytest.skip(f"this systemd-analyze cannot look at a file: {done.stderr}")
    assert done.returncode == 0, done.stdout


def test_each_protection_that_is_off_has_its_reason() -> None:
    text = WORKER.read_text()
    off = [name for name, value in directives(WORKER) if value in {"no", "all", "default"}]
    unsaid = [name for name in off if name.startswith(("Protect", "Private", "Memory", "Proc"))]
    assert unsaid
    assert [name for name in unsaid if f"# Open ({name}=" not in text] == []


def test_what_bubblewrap_needs_is_open_and_no_more() -> None:
    (namespaces,) = values(WORKER, "RestrictNamespaces")
    assert set(namespaces.split()) == {"user", "mnt", "pid", "net", "ipc", "uts"}
    allowed = set(values(WORKER, "SystemCallFilter")[0].split())
    assert {"mount", "umount2", "pivot_root", "clone3", "sethostname"} <= allowed
    (whole_proc,) = (value for value in values(WORKER, "BindPaths") if "/proc" in value)
    directory = Path(whole_proc.split(":")[1]).parent
    assert f"d {directory} 0700 root root" in (UNITS / "rvmcv-worker.tmpfiles").read_text()


def test_a_broken_configuration_is_not_tried_again() -> None:
    assert values(WORKER, "RestartPreventExitStatus") == [str(ExitCode.CONFIG.value)]
    assert values(WORKER, "OnFailure") == ["rvmcv-worker-failed.service"]


def test_secrets_come_from_where_the_worker_says_and_none_has_to_be_there() -> None:
    for name in config.CREDENTIAL_FILES.values():
        assert f"{name}:{config.INSTALLED_CREDENTIALS / name}" in values(WORKER, "LoadCredential")
        assert rf"{name}:\n" in values(WORKER, "SetCredential"), "else its absence fails the start"
    (reload_command,) = values(WORKER, "ExecReload")
    assert str(config.INSTALLED_CREDENTIALS / "token") in reload_command
    assert values(WORKER, "RuntimeDirectoryPreserve") == ["no"], "else an old token wins after a restart"


def test_directories_are_those_of_the_configuration() -> None:
    defaults = config.WorkerSettings()
    for unit in (WORKER, UNITS / "rvmcv-worker-wipe.service"):
        assert [f"/var/lib/{name}" for name in values(unit, "StateDirectory")] == [str(defaults.state_dir)]
    assert [f"/run/{name}" for name in values(WORKER, "RuntimeDirectory")] == [str(defaults.runtime_dir)]


def test_gpus_are_let_through_by_old_and_new_names() -> None:
    allowed = set(values(WORKER, "DeviceAllow"))
    names = ("nvidia", "nvidia-frontend", "nvidia-uvm", "nvidia-caps")
    assert {f"char-{name} rwm" for name in names} <= allowed
    assert not [device for device in allowed if not re.fullmatch(r"char-(nvidia.*|195) rwm", device)]
    back = " ".join(values(WORKER, "BindPaths")).split()
    assert {"-/dev/nvidiactl", "-/dev/nvidia-uvm", "-/dev/nvidia0", "-/dev/nvidia-caps"} <= set(back)


def test_wiping_does_not_wait_for_the_worker_to_be_enabled() -> None:
    assert values(UNITS / "rvmcv-worker-wipe.service", "WantedBy") == ["multi-user.target"]
    assert values(UNITS / "rvmcv-worker-wipe.timer", "WantedBy") == ["timers.target"]
    assert values(UNITS / "rvmcv-worker-wipe.service", "Before") == ["rvmcv-worker.service"]
