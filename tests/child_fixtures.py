"""Real children for tests: started with the wall and without it, and looked for afterwards."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import workspace
from rvmcv_worker.config import LimitSettings
from rvmcv_worker.executor import CHILD, ChildEnd, ChildSpec, run_child
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.launch import PYTHON
from rvmcv_worker.sandbox import Bubblewrap, PlainProcess, Sandbox
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace

#: Small enough to be reached in a test; no floor, for the disk of the machine is not what is tested.
LIMITS = LimitSettings(max_job_memory_gb=1.0, max_workspace_gb=0.2, disk_floor_gb=0.001, max_log_mb=1.0)

#: The head of a script that stands for a child: `answer(…)` ends it with a result.
SCRIPT = """
import json, os, sys
directory = sys.argv[1]
job = json.load(open(directory + "/job.json"))
def answer(**result):
    with open(directory + "/result.json", "w") as file:
        json.dump({"ok": True, "result": result}, file)
    sys.exit(0)
"""


@dataclass
class Runner:
    """Runs children in one workspace; `marker` is in the environment or command line of all of these."""

    sandbox: Sandbox
    workspace: Workspace
    spawner: Spawner
    marker: str
    interrupt: Interrupt = field(default_factory=Interrupt)
    limits: LimitSettings = LIMITS
    gpus: tuple[int, ...] = ()
    progress: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def stub(
        self,
        then: str = "complete",
        *,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        **job: Any,
    ) -> ChildEnd:
        """Run the stub job; keys of `job` that are the spec's go there."""
        return self._run({"task": "stub", "steps": 2, "then": then, **job}, CHILD, on_progress)

    def child(
        self, job: dict[str, Any], *, on_progress: Callable[[dict[str, Any]], None] | None = None, **spec: Any
    ) -> ChildEnd:
        """Run any job, perhaps in another `command`; keys of `job` that are the spec's go there."""
        command = spec.pop("command", CHILD)
        return self._run({**job, **spec}, command, on_progress)

    def start_over(self) -> None:
        """Forget what was told and wished, as for another attempt."""
        self.interrupt.close()
        self.interrupt = Interrupt()
        self.progress.clear()

    def script(self, body: str, **job: Any) -> dict[str, Any]:
        """Run a script in a child's place and return its answer."""
        return self.run_script(body, **job).result

    def run_script(self, body: str, **job: Any) -> ChildEnd:
        """Run a script in a child's place."""
        return self._run(job, (*PYTHON, "-c", SCRIPT + body), None)

    def _run(
        self,
        job: dict[str, Any],
        command: tuple[str, ...],
        on_progress: Callable[[dict[str, Any]], None] | None,
    ) -> ChildEnd:
        spec = ChildSpec(
            name=job.pop("name", "train"),
            timeout_s=job.pop("timeout_s", 60.0),
            readable=job.pop("readable", ()),
            gpus=self.gpus,
            job=job,
        )
        return run_child(
            spec,
            workspace=self.workspace,
            sandbox=self.sandbox,
            spawner=self.spawner,
            limits=self.limits,
            interrupt=self.interrupt,
            on_progress=on_progress or self.progress.append,
            term_grace_s=job.pop("term_grace_s", 10.0),
            cancel_grace_s=job.pop("cancel_grace_s", 10.0),
            log=self.lines.append,
            command=command,
        )


def marked_processes(marker: str) -> list[str]:
    """Return the command line of each living process that has `marker` in it or in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command_line = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if state not in "ZX" and marker.encode() in command_line + environment:
            found.append(
                f"{entry.name}: {command_line.replace(bytes(1), b' ').decode(errors='replace')[:200]}"
            )
    return found


@pytest.fixture(scope="session")
def wall() -> Bubblewrap:
    wall = Bubblewrap()
    wall.probe()
    return wall


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    spawner = Spawner()
    yield spawner
    spawner.close()


def make_runner(
    sandbox: Sandbox, spawner: Spawner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    marker = f"rvmcv-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("TZ", f":{marker}")  # one of the few variables that children inherit
    with workspace.make(tmp_path / "work", "job", 1) as place:
        runner = Runner(sandbox, place, spawner, marker)
        yield runner
        runner.interrupt.close()
        assert marked_processes(marker) == []
    assert list((tmp_path / "work").iterdir()) == []


@pytest.fixture(params=["wall", "plain"])
def runner(
    request: pytest.FixtureRequest, spawner: Spawner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    """A runner with the wall, then one without; whatever a test does, no process may be left."""
    sandbox = request.getfixturevalue("wall") if request.param == "wall" else PlainProcess()
    yield from make_runner(sandbox, spawner, tmp_path, monkeypatch)


@pytest.fixture
def walled(
    wall: Bubblewrap, spawner: Spawner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    """A runner behind the wall."""
    yield from make_runner(wall, spawner, tmp_path, monkeypatch)
