"""`rvmcv-worker`: what ops type."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rvmcv_worker import __version__, config
from rvmcv_worker.cli_common import DEFAULT_CONFIG, ConfigFile, give_up, load
from rvmcv_worker.cli_control import app as control
from rvmcv_worker.cli_service import app as service
from rvmcv_worker.events import Event, event
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.log_output import LogFormat

app = typer.Typer(
    help="Claims computer-vision jobs of RVM-Server, runs them behind a wall, reports and wipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(control)
app.add_typer(service)


@app.command()
def run(
    file: ConfigFile = DEFAULT_CONFIG,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help="Lines for people, or an object a line for programs; \\[worker] log_format else."),
    ] = None,
) -> None:
    """Run the daemon until SIGTERM.

    SIGHUP reads the token again, SIGUSR1 pauses or resumes, SIGUSR2 drains.
    """
    from rvmcv_worker import daemon, ledger, state_lock

    try:
        raise typer.Exit(daemon.run(config.load(file), log_format))
    except config.ConfigError as error:
        _do_not_start(str(error), ExitCode.CONFIG, log_format)
    except state_lock.AlreadyRunningError as error:
        _do_not_start(str(error), ExitCode.ALREADY_RUNNING, log_format)
    except ledger.LedgerUnavailableError as error:
        advice = "make room on the disk, or see who holds it: fuser -v FILE"
        _do_not_start(f"{error}; {advice}", ExitCode.FAILED, log_format)


def _do_not_start(message: str, code: ExitCode, log_format: LogFormat | None) -> NoReturn:
    """Say why the daemon cannot begin: as an event for the journal and for programs, else to a person."""
    from rvmcv_worker import journal, log_output

    if log_format != "json" and not journal.has_stderr():
        give_up(message, code)
    log_output.configure("INFO", log_format or "text")
    for line in message.splitlines():
        event(Event.WORKER_NOT_STARTED).critical("{}", line)
    raise typer.Exit(code)


@app.command()
def doctor(
    file: ConfigFile = DEFAULT_CONFIG,
    wall: Annotated[
        bool, typer.Option("--sandbox", help="Show instead what a job can see and do, asked from inside.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --sandbox: for programs.")] = False,
) -> None:
    """Check what the worker needs, one line each with what to do; the exit code says all.

    Root's is done as the installed service, by its user and with its credentials.
    """
    if file == DEFAULT_CONFIG:
        from rvmcv_worker import as_service

        as_service.take_over(sys.argv[1:])
    if wall:
        _show_sandbox(file, as_json=as_json)
        return
    if as_json:
        raise typer.BadParameter("--json is for --sandbox")
    from rich.console import Console

    from rvmcv_worker import log_output
    from rvmcv_worker.doctor import examine

    log_output.configure("ERROR")  # its findings say the rest

    raise typer.Exit(ExitCode.OK if examine(load(file), Console()) else ExitCode.FAILED)


def _show_sandbox(file: Path, *, as_json: bool) -> None:
    from rvmcv_worker import sandbox_view

    try:
        found = sandbox_view.look(load(file))
    except sandbox_view.SandboxViewError as error:
        give_up(str(error), ExitCode.FAILED)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for line in sandbox_view.lines(found):
        typer.echo(line)


@config_app.command("show")
def config_show(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Print the values in force, defaults included; secrets are masked."""
    settings = load(file)
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
        give_up(
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
