"""What a child finds behind the wall, asked from inside."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Any

import pytest

import rvmcv_worker
from rvmcv_worker import errors, workspace
from rvmcv_worker.config import LimitSettings, SandboxSettings
from rvmcv_worker.sandbox import Bubblewrap, PlainProcess, SandboxUnavailableError, choose
from tests.child_fixtures import Runner, spawner, wall, walled

__all__ = ["spawner", "wall", "walled"]

pytestmark = pytest.mark.slow

#: Tries to open each of `job["paths"]`, and tells which it could.
READ = """
def can_read(path):
    try:
        if os.path.isdir(path):
            return bool(os.listdir(path))
        open(path, "rb").read(1)
    except OSError:
        return False
    return True
answer(read=[path for path in job["paths"] if can_read(path)])
"""

WRITE = """
def can_write(path):
    try:
        if os.path.isdir(path):
            os.close(os.open(path + "/written", os.O_CREAT | os.O_WRONLY))
        else:
            os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True
answer(written=[path for path in job["paths"] if can_write(path)])
"""


def test_secrets_and_other_jobs_are_not_there(walled: Runner, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a secret")
    (walled.workspace.out_dir / "frozen.pt").write_text("the daemon's")
    (walled.workspace.child_dir("other") / "file").write_text("another child's")
    with workspace.make(tmp_path / "work", "other", 1) as other:
        secret = other.in_dir / "dataset.zip"
        secret.write_text("another job's")
        paths = [token, secret, other.root, walled.workspace.root, walled.workspace.out_dir / "frozen.pt"]
        paths += [Path("/job/out"), Path("/job/other"), tmp_path]
        hidden = [
            "/etc/shadow",
            "/etc/hostname",
            "/root/.ssh",
            "/home",
            "/var",
            "/run",
            "/boot",
            "/opt",
            "/mnt",
            "/srv",
        ]
        hidden += ["/proc/1/environ", f"/proc/{os.getpid()}", "/sys/class/net", "/sys/kernel", "/sys/fs"]
        hidden += [str(Path(__file__).parents[2] / name) for name in ("pyproject.toml", "tests", ".git")]
        assert all(path.exists() for path in paths if not path.is_relative_to("/job"))
        answer = walled.script(READ, paths=[*map(str, paths), *hidden, "/job/train/job.json"])
    assert [path for path in answer["read"] if path != "/proc/1/environ"] == ["/job/train/job.json"]


def test_the_daemons_environment_is_nowhere(walled: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "a-secret-in-the-environment")
    body = """
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try:
            found.append(open(f"/proc/{pid}/{name}", "rb").read().decode())
        except OSError:
            pass
pids = len(list(filter(str.isdigit, os.listdir("/proc"))))
answer(pids=pids, text=" ".join(found), names=sorted(os.environ))
"""
    answer = walled.script(body)
    assert answer["pids"] == 2  # the namespace's first process and the child
    assert "train" in answer["text"]
    assert "a-secret" not in answer["text"]
    assert set(answer["names"]) <= {
        *("PATH", "HOME", "TMPDIR", "LANG", "USER", "TZ", "PWD", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    }


def test_only_its_own_directory_is_writable(walled: Runner) -> None:
    (walled.workspace.in_dir / "dataset.zip").write_text("fetched")
    walled.workspace.child_dir("prepare")
    package = Path(rvmcv_worker.__file__).parent
    paths = ["/", "/job", "/job/in", "/job/in/dataset.zip", "/job/prepare", "/job/train", "/tmp", "/dev/shm"]
    paths += [
        "/usr",
        "/usr/lib",
        "/etc",
        "/etc/passwd",
        "/dev",
        "/sys/devices/system/cpu",
        "/proc/sysrq-trigger",
    ]
    # The daemon's user owns these when it is root, whatever capabilities are gone.
    paths += ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/overcommit_memory"]
    paths += [os.__file__, str(package), str(package / "errors.py"), str(package / "compute")]
    answer = walled.script(WRITE, paths=paths, readable=("prepare",))
    assert answer["written"] == ["/job/train", "/tmp", "/dev/shm"]
    assert (walled.workspace.root / "train" / "written").exists()


def test_the_child_cannot_move_itself_to_the_back_of_the_kernels_list(walled: Runner) -> None:
    body = """
def score():
    return open("/proc/self/oom_score_adj").read().strip()
try:
    open("/proc/self/oom_score_adj", "w").write("0")
    refused = False
except OSError:
    refused = True
answer(refused=refused, score=score())
"""
    assert walled.script(body) == {"refused": True, "score": "1000"}


def test_what_the_daemon_fetched_and_earlier_children_made_is_readable(walled: Runner) -> None:
    (walled.workspace.in_dir / "dataset.zip").write_text("fetched")
    (walled.workspace.child_dir("prepare") / "data.yaml").write_text("names: []")
    paths = ["in/dataset.zip", "prepare/data.yaml", "/job/in/dataset.zip", "/etc/passwd"]
    assert walled.script(READ, paths=paths, readable=("prepare",))["read"] == paths


def test_no_network(walled: Runner) -> None:
    name = f"\0rvmcv-{uuid.uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(name)
        abstract.listen()
        body = """
import socket
def reached(family, address):
    try:
        with socket.socket(family) as client:
            client.settimeout(5)
            client.connect(address)
    except OSError:
        return False
    return True
answer(
    tcp=reached(socket.AF_INET, ("127.0.0.1", job["port"])),
    abstract=reached(socket.AF_UNIX, job["address"]),
    interfaces=[name for _, name in socket.if_nameindex()],
)
"""
        port = server.getsockname()[1]
        answer = walled.script(body, port=port, address=name)
        socket.create_connection(("127.0.0.1", port)).close()  # the daemon itself does reach it
    assert answer == {"tcp": False, "abstract": False, "interfaces": ["lo"]}


def test_nothing_to_climb_with(walled: Runner) -> None:
    body = """
import ctypes, resource
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
libc = ctypes.CDLL(None, use_errno=True)
answer(
    capabilities=[status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    no_new_privileges=status["NoNewPrivs"].strip(),
    uid=[os.getuid(), os.geteuid(), os.getgid()],
    new_namespace=libc.unshare(0x10000000),
    descriptors=[int(name) for name in os.listdir("/proc/self/fd")],
    progress_fd=job["progress_fd"],
    core=resource.getrlimit(resource.RLIMIT_CORE),
    file_size=resource.getrlimit(resource.RLIMIT_FSIZE)[0],
    oom=open("/proc/self/oom_score_adj").read().strip(),
    host=os.uname().nodename,
)
"""
    answer: dict[str, Any] = walled.script(body)
    assert set(answer["capabilities"]) == {"0000000000000000"}
    assert answer["no_new_privileges"] == "1"
    assert answer["uid"] == [1000, 1000, 1000]
    assert answer["new_namespace"] == -1
    # Besides the listed directory itself: input, output twice, progress.
    assert len(answer["descriptors"]) == 5
    assert {0, 1, 2, answer["progress_fd"]} < set(answer["descriptors"])
    assert answer["core"] == [0, 0]
    assert answer["file_size"] == 200_000_000
    assert answer["oom"] == "1000"
    assert answer["host"] == "job"


def test_memory_in_its_private_directories_counts(walled: Runner) -> None:
    walled.limits = LimitSettings(max_job_memory_gb=0.2, max_workspace_gb=1, disk_floor_gb=0.001)
    body = """
with open("/dev/shm/held", "wb") as file:
    try:
        while True:
            file.write(bytes(1_000_000))
    except OSError:
        pass
with open("/tmp/held", "wb") as file:
    try:
        while True:
            file.write(bytes(1_000_000))
    except OSError:
        pass
held = b"x" * 100_000_000
import signal
signal.pause()
"""
    with pytest.raises(errors.OutOfMemoryError):
        walled.script(body)


def test_torch_finds_what_it_needs(walled: Runner) -> None:
    pytest.importorskip("torch")
    body = """
import torch
torch.set_num_threads(1)
from torch.utils.data import DataLoader
loader = DataLoader(torch.arange(8.0), batch_size=4, num_workers=1)
total = sum(batch.sum().item() for batch in loader)
with torch.no_grad():
    shape = list(torch.nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 8, 8)).shape)
answer(total=total, shape=shape)
"""
    walled.limits = LimitSettings(disk_floor_gb=0.001)
    assert walled.script(body) == {"total": 28.0, "shape": [1, 4, 6, 6]}


def test_a_gpu_that_is_not_there_is_named(walled: Runner) -> None:
    with pytest.raises(errors.InternalError, match=r"/dev/nvidia97 is not there"):
        walled.sandbox.start(
            ["true"],
            workspace=walled.workspace,
            writable="train",
            gpus=(97,),
            output=1,
            limits=walled.limits,
            spawner=walled.spawner,
        )


def test_a_directory_to_hide_is_hidden_inside_one_that_is_shown(walled: Runner, tmp_path: Path) -> None:
    for name in ("shown", "state"):
        (tmp_path / "opt" / name).mkdir(parents=True)
        (tmp_path / "opt" / name / "file").write_text("content")
    walled.sandbox = Bubblewrap(extra_read_only=[tmp_path / "opt"], hide=[tmp_path / "opt" / "state"])
    paths = [str(tmp_path / "opt" / name / "file") for name in ("shown", "state")]
    assert walled.script(READ, paths=paths)["read"] == paths[:1]


def test_a_wall_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        SandboxUnavailableError, match=r"uid map: Permission denied \(user namespaces are not allowed"
    ):
        choose(SandboxSettings(mode="required"))
    assert isinstance(choose(SandboxSettings(mode="auto")), PlainProcess)
