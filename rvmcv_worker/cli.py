"""`rvmcv-worker`: what ops type."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from rvmcv_worker import __version__, config
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.logs import redact
from rvmcv_worker.terminal import say

if TYPE_CHECKING:
    from rvmcv_worker.control_client import ControlClient

#: Where the installed service keeps its configuration.
DEFAULT_CONFIG = Path("/etc/rvmcv-worker/config.toml")

app = typer.Typer(
    help="Claims computer-vision jobs of RVM-Server, runs them behind a wall, reports and wipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Wait = Annotated[
    bool, typer.Option("--wait", help="Return once nothing runs and every final report is delivered.")
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Seconds that --wait lasts at most.", metavar="S")
]
ConfigFile = Annotated[Path, typer.Option("--config", help="The configuration file.", show_default=True)]


def _load(file: Path) -> config.Settings:
    try:
        return config.load(file)
    except config.ConfigError as error:
        _give_up(str(error), ExitCode.CONFIG)


def _give_up(message: str, code: ExitCode) -> NoReturn:
    say(Console(stderr=True), redact(message))
    raise typer.Exit(code)


@app.command()
def run(
    file: ConfigFile = DEFAULT_CONFIG,
    log_format: Annotated[
        Literal["text", "json"] | None,
        typer.Option(help="Lines for people, or an object a line for programs; \\[worker] log_format else."),
    ] = None,
) -> None:
    """Run the daemon until SIGTERM.

    SIGHUP reads the token again, SIGUSR1 pauses or resumes, SIGUSR2 drains.
    """
    from rvmcv_worker import daemon, ledger, state_lock

    settings = _load(file)
    try:
        raise typer.Exit(daemon.run(settings, log_format))
    except config.ConfigError as error:
        _give_up(str(error), ExitCode.CONFIG)
    except state_lock.AlreadyRunningError as error:
        _give_up(str(error), ExitCode.ALREADY_RUNNING)
    except ledger.LedgerUnavailableError as error:
        _give_up(f"{error}; make room on the disk, or see who holds it: fuser -v FILE", ExitCode.FAILED)


@app.command()
def doctor(
    file: ConfigFile = DEFAULT_CONFIG,
    wall: Annotated[
        bool, typer.Option("--sandbox", help="Show instead what a job can see and do, asked from inside.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --sandbox: for programs.")] = False,
) -> None:
    """Check what the worker needs, one line each with what to do; the exit code says all."""
    if wall:
        _show_sandbox(file, as_json=as_json)
        return
    if as_json:
        raise typer.BadParameter("--json is for --sandbox")
    from rvmcv_worker.doctor import examine

    raise typer.Exit(ExitCode.OK if examine(_load(file), Console()) else ExitCode.FAILED)


def _show_sandbox(file: Path, *, as_json: bool) -> None:
    from rvmcv_worker import sandbox_view

    try:
        found = sandbox_view.look(_load(file))
    except sandbox_view.SandboxViewError as error:
        _give_up(str(error), ExitCode.FAILED)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for line in sandbox_view.lines(found):
        typer.echo(line)


@app.command()
def status(
    file: ConfigFile = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how the running worker is."""
    from rvmcv_worker import status_text

    with _worker(file) as worker:
        found = worker.status()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for line in status_text.lines(found):
        typer.echo(line)


@app.command()
def drain(file: ConfigFile = DEFAULT_CONFIG, wait: Wait = False, timeout_s: Timeout = None) -> None:
    """Claim nothing and hand running jobs back; the worker stays up, idle, until `resume`."""
    _wish(file, "drain", "drained: running jobs are handed back, nothing is claimed", wait, timeout_s)


@app.command()
def pause(file: ConfigFile = DEFAULT_CONFIG, wait: Wait = False, timeout_s: Timeout = None) -> None:
    """Claim nothing until `resume`; running jobs go on to their end."""
    _wish(file, "pause", "paused: running jobs go on, nothing is claimed", wait, timeout_s)


@app.command()
def resume(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Take back a `drain` or `pause`; a wish of RVM-Server's stays."""
    with _worker(file) as worker:
        holds = worker.tell("resume")["desired"]["holds"]
    typer.echo("resumed" if holds == "run" else f"taken back; RVM-Server still wishes: {holds}")


def _wish(file: Path, name: str, done: str, wait: bool, timeout_s: float | None) -> None:
    from rvmcv_worker import status_text

    if timeout_s is not None and not wait:
        raise typer.BadParameter("--timeout is for --wait")
    said = ""

    def tell(found: dict[str, Any]) -> None:
        nonlocal said
        if (line := status_text.waiting(found)) != said:
            typer.echo(line)
        said = line

    with _worker(file) as worker:
        worker.tell(name)
        typer.echo(done)
        if wait:
            worker.wait_idle(name, timeout_s, tell)


@contextlib.contextmanager
def _worker(file: Path) -> Iterator[ControlClient]:
    """The running worker; what keeps it from answering ends the command."""
    from rvmcv_worker.control_client import ControlClient, ControlError

    try:
        yield ControlClient(_load(file).worker.runtime_dir)
    except ControlError as error:
        _give_up(str(error), error.code)


@app.command()
def wipe(
    file: ConfigFile = DEFAULT_CONFIG,
    store: Annotated[bool, typer.Option("--store", help="Empty the model store too.")] = False,
    if_idle: Annotated[
        bool, typer.Option("--if-idle", help="Do nothing, and succeed, while a worker runs.")
    ] = False,
) -> None:
    """Wipe what a worker that does not run has left on the disk.

    Files of jobs whose checkpoints its next start could still bring to storage are kept, for seven days in
    which the machine is on. A running worker wipes by itself; --store then asks it to empty its model store,
    but for the models that jobs use.
    """
    from rvmcv_worker import errors, ledger, leftovers, state_lock

    settings = _load(file)
    try:
        for line in leftovers.wipe(settings, store=store):
            typer.echo(redact(line))
    except state_lock.AlreadyRunningError as error:
        if if_idle:
            typer.echo("a worker runs, which wipes by itself: nothing to do")
        elif store:
            with _worker(file) as worker:
                worker.tell("wipe-store")
            typer.echo("the worker empties its model store, but for the models that jobs use")
        else:
            _give_up(f"{error}; while it runs it wipes by itself", ExitCode.ALREADY_RUNNING)
    except config.ConfigError as error:
        _give_up(str(error), ExitCode.CONFIG)
    except (ledger.LedgerUnavailableError, errors.InternalError, OSError) as error:
        _give_up(f"not all is wiped: {error}", ExitCode.FAILED)


@app.command(hidden=True)
def report_failure(
    file: ConfigFile = DEFAULT_CONFIG,
    unit: Annotated[str, typer.Option(help="The service that has failed.")] = "rvmcv-worker.service",
) -> None:
    """Tell RVM-Server that the worker has failed for good: what systemd runs then."""
    from rvmcv_worker import failure_report, state_lock, unit_result

    try:
        settings, wrong = failure_report.what_it_needs(file)
        state_dir = settings.worker.state_dir
        told = failure_report.report(
            settings,
            redact(wrong or unit_result.why_failed(unit)),
            runs_again=lambda: state_lock.is_held(state_dir) or unit_result.is_active(unit),
        )
    except config.ConfigError as error:
        _give_up(f"RVM-Server is not told that the worker has failed: {error}", ExitCode.CONFIG)
    except failure_report.NotReportedError as error:
        _give_up(f"RVM-Server is not told that the worker has failed: {error}", ExitCode.FAILED)
    typer.echo("RVM-Server knows that the worker has failed" if told else "a worker runs: nothing to report")


@app.command(hidden=True)
def hand_over_token(
    source: Annotated[Path, typer.Argument(help="The file with the new token.")],
    pid: Annotated[int, typer.Argument(min=2, help="The daemon's process.")],
    file: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Give a running worker a new token, as root: what `systemctl reload` does."""
    from rvmcv_worker import token_handover

    try:
        token_handover.hand_over(source, _load(file).worker.runtime_dir, pid)
    except token_handover.HandoverError as error:
        _give_up(f"not handed over, the worker goes on with the token it has: {error}", ExitCode.FAILED)


@config_app.command("show")
def config_show(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Print the values in force, defaults included; secrets are masked."""
    settings = _load(file)
    for line in config.show(settings):
        typer.echo(line)


@app.command()
def demo(
    dataset: Annotated[
        Path | None, typer.Option(help="A data set, folder or zip; without it one is drawn.", exists=True)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training.")] = None,
    img_size: Annotated[
        int | None, typer.Option(min=32, help="Side of the training images, in pixels.")
    ] = None,
    sam2: Annotated[
        Path | None, typer.Option(help="A checkpoint of SAM2.1 (sam2.1_hiera_….pt), for masks.", exists=True)
    ] = None,
    segment: Annotated[
        bool,
        typer.Option(
            "--segment",
            help="After the detector fine-tune SAM2 on polygons, from --sam2 or else from random weights, "
            "and have it make masks. On drawn data all of it takes some five minutes on two cores.",
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the summary goes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("demo-out"),
) -> None:
    """Run trainings and inferences on an embedded RVM-Server and show what happens."""
    try:
        from rvmcv_worker.demo.run import run_demo
        from rvmcv_worker.demo.wishes import Wishes
    except ImportError as error:
        _give_up(
            f"{error}: the demo needs the extras: pip install 'rvmcv-worker[compute,reference]'",
            ExitCode.FAILED,
        )
    wishes = Wishes(dataset=dataset, epochs=epochs, img_size=img_size, sam2=sam2, segment=segment)
    raise typer.Exit(run_demo(wishes, json_file=json_file, out_dir=out))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
