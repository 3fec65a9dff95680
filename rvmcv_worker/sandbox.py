"""The wall around every child: a bubblewrap command line, or a confined plain process without it.

What a child finds behind the wall, and nothing else: a read-only system reduced to what Python needs,
`/job` with `in/` and earlier children's directories read-only and its own directory writable, a private
`/tmp` and `/dev/shm`, the GPUs it was given. No network, no other process, no secret, no capability, and
none of the system calls that `seccomp.py` lists.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rvmcv_worker import confine, landlock, launch, mounts, seccomp
from rvmcv_worker.config import LimitSettings, SandboxSettings
from rvmcv_worker.errors import InternalError
from rvmcv_worker.events import Event, event
from rvmcv_worker.launch import SandboxUnavailableError
from rvmcv_worker.process_tree import COOKIE, CookieTree, NamespaceTree, ProcessTree
from rvmcv_worker.spawner import Spawner
from rvmcv_worker.workspace import Workspace

__all__ = [
    "Bubblewrap",
    "MissingWall",
    "PlainProcess",
    "Sandbox",
    "SandboxUnavailableError",
    "Trial",
    "choose",
    "try_out",
]

#: The user that a child is behind the wall, whoever the daemon is.
_UID = 1000
#: How long bubblewrap may take to say which process is the namespace's first.
_START_S = 30.0
#: How much of what a program says is read that is only tried out.
_OUTPUT_BYTES = 1_000_000
#: What is open without a wall, with Landlock and without it.
_WITH_LANDLOCK = (
    "no wall: a job reaches unix sockets and /dev/shm as this user, and sees the machine's processes; "
    "Landlock keeps it to its own files"
)
_WITH_NOTHING = "no wall: a job reads, changes and ends whatever this user can; install bubblewrap"


class Sandbox(abc.ABC):
    """How children are started; chosen once when the daemon starts."""

    #: As the worker status tells it.
    name: str
    #: What a hostile job could still do, in a sentence that the worker status tells; empty behind a wall.
    shortcoming = ""

    @abc.abstractmethod
    def start(
        self,
        argv: Sequence[str],
        *,
        workspace: Workspace,
        writable: str,
        readable: Sequence[str] = (),
        gpus: Sequence[int] = (),
        gpu_memory_fraction: float = 1.0,
        keep_fds: Sequence[int] = (),
        output: int,
        limits: LimitSettings,
        spawner: Spawner,
    ) -> ProcessTree:
        """Start `argv` with the job's root as working directory, stdout and stderr to `output`.

        `writable` and `readable` name directories of the workspace, `gpus` the N of `/dev/nvidiaN`, of each
        of whose memory it may take `gpu_memory_fraction`.
        Raises `InternalError` when the child cannot be started.
        """


def choose(settings: SandboxSettings, *, hide: Sequence[Path] = (), work_dir: Path | None = None) -> Sandbox:
    """Return the wall, tried out, or by `mode = "auto"` plain processes where there is none.

    `hide` names directories that no child may see even where they lie in a directory that it may. It is
    tried out in `work_dir`, so that a start sweeps what a daemon killed meanwhile has left.
    Raises `SandboxUnavailableError` when `mode` is "required" and the wall cannot be built.
    """
    try:
        wall = Bubblewrap(extra_read_only=settings.extra_read_only, hide=hide)
        wall.probe(work_dir)
    except SandboxUnavailableError as error:
        if settings.mode == "required":
            raise
        plain = PlainProcess(extra_read_only=settings.extra_read_only)
        event(Event.WALL_OPEN).warning("NO WALL ({}): {}; for trials only", error, plain.shortcoming)
        return plain
    return wall


class Bubblewrap(Sandbox):
    """The wall."""

    name = "bubblewrap"

    def __init__(self, *, extra_read_only: Sequence[Path] = (), hide: Sequence[Path] = ()) -> None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailableError("bubblewrap is not installed: apt install bubblewrap")
        self._bwrap = bwrap
        self._launcher = launch.launcher()
        try:
            self._filter = seccomp.program()
        except seccomp.UnknownMachineError as error:
            raise SandboxUnavailableError(str(error)) from None
        run = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False, env={})
        self._options = run.stdout + run.stderr
        #: From bubblewrap 0.8 on namespaces can be forbidden as such; the filter forbids them always.
        self._forbids_namespaces = "--disable-userns" in self._options
        self._python = mounts.python_mounts([*mounts.python_directories(), *extra_read_only], hide)

    def probe(self, work_dir: Path | None = None) -> None:
        """Start Python behind the wall; raises `SandboxUnavailableError` with what to do."""
        argv = (*launch.PYTHON, "-c", "import rvmcv_worker.framing")
        error = try_out(self, argv, work_dir).error
        if error and self._forbids_namespaces and "max_user_namespaces" in error:
            event(Event.WALL_OPEN).info(
                "bubblewrap cannot forbid nested user namespaces here and goes without: {}", error
            )
            self._forbids_namespaces = False
            error = try_out(self, argv, work_dir).error
        if error:
            raise SandboxUnavailableError(_advice(error))

    def start(
        self,
        argv: Sequence[str],
        *,
        workspace: Workspace,
        writable: str,
        readable: Sequence[str] = (),
        gpus: Sequence[int] = (),
        gpu_memory_fraction: float = 1.0,
        keep_fds: Sequence[int] = (),
        output: int,
        limits: LimitSettings,
        spawner: Spawner,
    ) -> ProcessTree:
        """Start `argv` behind the wall."""
        status_r, status_w = os.pipe()
        try:
            with _readable(*_accounts(), self._filter) as (passwd, group, seccomp_filter):
                try:
                    popen = spawner.start(
                        [
                            *self._launcher,
                            *launch.resource_limits(limits),
                            self._bwrap,
                            *self._namespaces(),
                            *self._system(limits),
                            *("--ro-bind-data", str(passwd), "/etc/passwd"),
                            *("--ro-bind-data", str(group), "/etc/group"),
                            *("--seccomp", str(seccomp_filter)),
                            *self._python,
                            *mounts.gpu_mounts(gpus),
                            *mounts.job_mounts(workspace, writable, readable),
                            # /proc too: a child could else lower its oom_score_adj again.
                            *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"),
                            *("--chdir", "/job"),
                            *_setenv(
                                launch.environment(
                                    mounts.TMP, gpus, gpu_memory_fraction=gpu_memory_fraction, walled=True
                                )
                            ),
                            *("--json-status-fd", str(status_w), "--"),
                            *argv,
                        ],
                        # A daemon that dies before bubblewrap has asked to die with it leaves it behind: the
                        # next start finds it by its cookie. The child itself gets none (--clearenv).
                        env={COOKIE: str(workspace.root)},
                        cwd=Path("/"),
                        output=output,
                        pass_fds=(*keep_fds, passwd, group, seccomp_filter, status_w),
                    )
                except OSError as error:
                    raise InternalError(f"the wall could not be started: {error}") from error
            os.close(status_w)
            status_w = -1
            init_pid = _init_pid(status_r, popen)
        except BaseException:
            os.close(status_r)
            if status_w >= 0:
                os.close(status_w)
            raise
        # The tree keeps the reading end: bubblewrap writes to it again at the end, and would die of SIGPIPE.
        return NamespaceTree(popen, init_pid, status_r)

    def _namespaces(self) -> list[str]:
        # Not `--unshare-all`, which goes without a user namespace where there is none to be had, and makes
        # one of cgroups, which shuts nothing off where no cgroup is in sight: the service's unit forbids it.
        options = [
            "--unshare-user",
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--uid",
            str(_UID),
            "--gid",
            str(_UID),
            "--hostname",
            "job",
        ]
        options += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
        return [*options, "--disable-userns"] if self._forbids_namespaces else options

    def _system(self, limits: LimitSettings) -> list[str]:
        memory_bytes = int(limits.max_job_memory_gb * 1e9)
        sizes = {mounts.TMP: memory_bytes // 4, mounts.SHM: memory_bytes // 2}
        return mounts.system_mounts(sizes, can_size="--size" in self._options)


class PlainProcess(Sandbox):
    """No wall: a process with a scrubbed environment and limits, no network, and what Landlock can do."""

    def __init__(self, *, extra_read_only: Sequence[Path] = ()) -> None:
        self._launcher = launch.launcher()
        self._setpriv = launch.tool("setpriv")
        self._has_landlock = landlock.version() > 0
        self._readable = [*mounts.python_directories(), *extra_read_only]
        self.name = "landlock" if self._has_landlock else "none"
        self.shortcoming = _WITH_LANDLOCK if self._has_landlock else _WITH_NOTHING

    def start(
        self,
        argv: Sequence[str],
        *,
        workspace: Workspace,
        writable: str,
        readable: Sequence[str] = (),
        gpus: Sequence[int] = (),
        gpu_memory_fraction: float = 1.0,
        keep_fds: Sequence[int] = (),
        output: int,
        limits: LimitSettings,
        spawner: Spawner,
    ) -> ProcessTree:
        """Start `argv`; without Landlock nothing hides the other directories."""
        home = workspace.child_dir(writable) / "tmp"
        home.mkdir(mode=0o700, exist_ok=True)
        cookie = str(workspace.root)
        environment = launch.environment(home, gpus, gpu_memory_fraction=gpu_memory_fraction, walled=False)
        # Several GPUs talk over the loopback, which cannot be told from the network here.
        ranks = len(gpus) > 1
        ruleset = mounts.ruleset(workspace, writable, readable, self._readable, gpus, tcp=ranks)
        plan = confine.plan(_filter(internet=ranks), ruleset if self._has_landlock else None)
        command = [*self._launcher, *launch.resource_limits(limits)]
        command += [self._setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
        if os.geteuid() == 0:
            command += ["--bounding-set", "-all", "--inh-caps", "-all"]
        try:
            with _readable(plan) as (plan_fd,):
                popen = spawner.start(
                    [*command, *launch.PYTHON, "-m", "rvmcv_worker.confine", str(plan_fd), *argv],
                    env=environment | {COOKIE: cookie},
                    cwd=workspace.root,
                    output=output,
                    pass_fds=(*keep_fds, plan_fd),
                )
        except OSError as error:
            raise InternalError(f"the job's process could not be started: {error}") from error
        return CookieTree(popen, cookie)


class MissingWall(Sandbox):
    """Where a wall is required and cannot be built: starts nothing."""

    name = "missing"

    def start(self, *_: object, **__: object) -> ProcessTree:
        """Raise `InternalError`."""
        raise InternalError("no wall, no children: see `rvmcv-worker doctor`")


@dataclass(frozen=True)
class Trial:
    """How a program ended that was started in a job's place."""

    output: str
    #: What went wrong, in the program's own words where it had any; empty when nothing did.
    error: str


def try_out(
    wall: Sandbox,
    argv: Sequence[str],
    work_dir: Path | None = None,
    *,
    limits: LimitSettings = LimitSettings(),  # noqa: B008 - frozen
) -> Trial:
    """Run `argv` as a job's child would be, in a workspace for it alone, to its end."""
    with (
        contextlib.closing(Spawner()) as spawner,
        tempfile.TemporaryDirectory(prefix="rvmcv-probe-", dir=work_dir) as root,
        tempfile.TemporaryFile() as file,
    ):
        workspace = Workspace(Path(root), "probe", 1)
        workspace.in_dir.mkdir()
        try:
            tree = wall.start(
                argv,
                workspace=workspace,
                writable="probe",
                output=file.fileno(),
                limits=limits,
                spawner=spawner,
            )
            with contextlib.closing(tree):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tree.popen.wait(_START_S)
                tree.kill()
                error = f"exit status {tree.exit_status()}" if tree.exit_status() else ""
        except InternalError as failed:
            error = failed.message
        file.seek(0)
        output = file.read(_OUTPUT_BYTES).decode(errors="replace").strip()
        return Trial(output, error and (output[:4000] or error))


def _setenv(environment: dict[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        yield from ("--setenv", name, value)


def _filter(*, internet: bool) -> bytes | None:
    try:
        return seccomp.program(internet=internet)
    except seccomp.UnknownMachineError:
        return None


def _accounts() -> tuple[bytes, bytes]:
    """Return a made-up passwd and group: libraries ask for the user's name."""
    passwd = f"job:x:{_UID}:{_UID}:job:/tmp:/bin/false\n"
    return passwd.encode(), f"job:x:{_UID}:\n".encode()


@contextlib.contextmanager
def _readable(*contents: bytes) -> Iterator[list[int]]:
    """Descriptors to read each of `contents` from: files in memory.

    Pipes would do, but a job of this user that holds many has new ones hold next to nothing: see
    `pipe-user-pages-soft` in pipe(7). To write to one would then wait for ever.
    """
    with contextlib.ExitStack() as files:
        descriptors = []
        for content in contents:
            file = files.enter_context(os.fdopen(os.memfd_create("rvmcv-plan"), "w+b"))
            file.write(content)
            file.seek(0)
            descriptors.append(file.fileno())
        yield descriptors


def _init_pid(status: int, popen: subprocess.Popen[bytes]) -> int:
    """Read the namespace's first process from bwrap's status; raises `InternalError` without one."""
    poll = select.poll()
    poll.register(status, select.POLLIN)
    line = b""
    while b"\n" not in line and poll.poll(_START_S * 1000):
        data = os.read(status, 4096)
        if not data:
            break
        line += data
    try:
        return int(json.loads(line.partition(b"\n")[0])["child-pid"])
    except (ValueError, KeyError, TypeError):
        popen.kill()
        popen.wait()
        raise InternalError("the wall could not be built; `rvmcv-worker doctor` says why") from None


def _advice(error: str) -> str:
    """Say what to do about bwrap's own words."""
    hint = "try it by hand: bwrap --unshare-all --ro-bind / / true"
    if "uid map" in error or "new namespace" in error or "loopback" in error:
        hint = "user namespaces are not allowed to this user: "
        if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
            hint += (
                "AppArmor restricts them; give /usr/bin/bwrap a profile with `userns,` (docs/operations.md)"
            )
        elif _sysctl("kernel/unprivileged_userns_clone") == "0":
            hint += "sysctl kernel.unprivileged_userns_clone=1"
        elif _sysctl("user/max_user_namespaces") == "0":
            hint += "sysctl user.max_user_namespaces=15000"
        else:
            hint += "in a container, allow `unshare` and `mount` in its seccomp profile"
    elif "mount proc" in error:
        hint = "this container masks /proc: run it with systempaths=unconfined, or the worker outside of it"
    elif "No module named" in error:
        hint = "install rvmcv-worker into a virtual environment; a user's own site-packages are not used"
    return f"bubblewrap cannot build the wall: {error} ({hint})"


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
