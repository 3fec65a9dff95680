"""The commands of `rvmcv-worker` for the daemon that runs: how is it, what of a job, and what it shall do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rvmcv_worker.cli_common import DEFAULT_CONFIG, ConfigFile, give_up, load, worker
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.job_id import JOB_ID

#: Seconds between two looks of `status --watch`, and how long each waits for a worker that may hang.
_WATCH_S, _WATCH_ANSWER_S = 2.0, 3.0

app = typer.Typer()


def _job_id(text: str) -> str:
    if not re.fullmatch(JOB_ID, text):
        raise typer.BadParameter("not the id of a job: letters, digits, '.', '_' and '-', at most 128")
    return text


Wait = Annotated[
    bool, typer.Option("--wait", help="Return once nothing runs and every final report is delivered.")
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Seconds that --wait lasts at most.", metavar="S")
]
Job = Annotated[str, typer.Argument(callback=_job_id, metavar="JOB", help="Its id, as `status` shows it.")]


@app.command()
def status(
    file: ConfigFile = DEFAULT_CONFIG,
    seconds: Annotated[
        float | None, typer.Argument(help="With --watch: seconds between two looks, 0.2 to 3600; 2.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs; with --watch an object a line.")
    ] = False,
) -> None:
    """Show how the running worker is: its state, jobs, GPUs, disk, and how the last jobs ended."""
    if seconds is not None and not watch:
        raise typer.BadParameter("SECONDS is for --watch")
    if seconds is not None and not 0.2 <= seconds <= 3600:
        raise typer.BadParameter("SECONDS between two looks: 0.2 to 3600")
    if watch:
        from rvmcv_worker.status_watch import watch as look_on
        from rvmcv_worker.terminal import console

        with worker(file, answer_s=_WATCH_ANSWER_S) as client:
            look_on(client, console(), seconds or _WATCH_S, as_json=as_json)
        return
    with worker(file) as client:
        found = client.status()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rvmcv_worker.status_view import StatusView
    from rvmcv_worker.terminal import console, print_plain

    print_plain(console(), StatusView(found))


@app.command()
def logs(
    job: Job,
    file: ConfigFile = DEFAULT_CONFIG,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """Show the last lines about a job that runs or ended here lately, and those that its children printed."""
    from rvmcv_worker import job_log_text
    from rvmcv_worker.control_client import ControlClient, ControlError, UnknownJobError

    settings = load(file)
    try:
        job_log_text.tell(ControlClient(settings.worker.runtime_dir), job, follow=follow)
    except ControlError as error:
        has_nothing = isinstance(error, UnknownJobError) or error.code is ExitCode.NOT_RUNNING
        hints = job_log_text.elsewhere(job, settings) if has_nothing else ()
        give_up("\n".join([str(error), *hints]), error.code)
    except KeyboardInterrupt:  # what `--follow` is ended with
        raise typer.Exit(ExitCode.OK) from None


@app.command()
def cancel(
    job: Job,
    file: ConfigFile = DEFAULT_CONFIG,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return once it is over, wiped, and RVM-Server was told.")
    ] = False,
    timeout_s: Timeout = None,
) -> None:
    """End a job that runs here, for good: it publishes nothing, and RVM-Server hears that you cancelled it.

    To have it run again later or elsewhere, use `drain` instead, or queue it anew at RVM-Server.
    """
    _check(wait, timeout_s)
    with worker(file) as client:
        client.cancel(job)
        typer.echo(f"{job} is asked to end; RVM-Server is told that it was cancelled")
        ended = client.wait_over(job, timeout_s) if wait else None
    if ended not in (None, "cancelled"):
        give_up(f"{job} came to another end in that moment: {ended}", ExitCode.FAILED)
    if wait:
        typer.echo(f"{job} is over{f': {ended}' if ended else ''}")


@app.command()
def drain(file: ConfigFile = DEFAULT_CONFIG, wait: Wait = False, timeout_s: Timeout = None) -> None:
    """Claim nothing and hand running jobs back; the worker stays up, idle, until `resume`."""
    _wish(
        file,
        "drain",
        "drained: running jobs leave a checkpoint and are handed back, nothing is claimed until `resume`",
        wait,
        timeout_s,
    )


@app.command()
def pause(file: ConfigFile = DEFAULT_CONFIG, wait: Wait = False, timeout_s: Timeout = None) -> None:
    """Claim nothing until `resume`; running jobs go on to their end."""
    _wish(file, "pause", "paused: running jobs go on, nothing is claimed until `resume`", wait, timeout_s)


@app.command()
def resume(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Take back a `drain` or `pause`; a wish of RVM-Server's stays."""
    with worker(file) as client:
        told = client.tell("resume")
    holds = told["desired"]["holds"]
    if holds != "run":
        typer.echo(f"taken back; RVM-Server still wishes: {holds}")
    elif told["state"] == "degraded":
        typer.echo("resumed, but degraded: `rvmcv-worker status` says why")
    else:
        typer.echo("resumed")


def _wish(file: Path, name: str, done: str, wait: bool, timeout_s: float | None) -> None:
    from rvmcv_worker import status_text

    _check(wait, timeout_s)
    said = ""

    def tell(found: dict[str, Any]) -> None:
        nonlocal said
        if (line := status_text.waiting(found)) != said:
            typer.echo(line)
        said = line

    with worker(file) as client:
        client.tell(name)
        typer.echo(done)
        if wait:
            client.wait_idle(name, timeout_s, tell)


def _check(wait: bool, timeout_s: float | None) -> None:
    if timeout_s is not None and not wait:
        raise typer.BadParameter("--timeout is for --wait")
