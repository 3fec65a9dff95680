"""The commands of `rvmcv-worker` that its units run: wipe, report a failure, hand over a token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rvmcv_worker import config
from rvmcv_worker.cli_common import DEFAULT_CONFIG, ConfigFile, give_up, load
from rvmcv_worker.cli_common import worker as running
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.logs import redact

app = typer.Typer()


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
    from rvmcv_worker import errors, ledger, leftovers, log_output, state_lock

    log_output.configure("INFO")  # a ledger that is set aside is told as the daemon tells it
    settings = load(file)
    try:
        for line in leftovers.wipe(settings, store=store):
            typer.echo(redact(line))
    except state_lock.AlreadyRunningError as error:
        if if_idle:
            typer.echo("a worker runs, which wipes by itself: nothing to do")
        elif store:
            with running(file) as worker:
                worker.tell("wipe-store")
            typer.echo("the worker empties its model store, but for the models that jobs use")
        else:
            give_up(f"{error}; while it runs it wipes by itself", ExitCode.ALREADY_RUNNING)
    except config.ConfigError as error:
        give_up(str(error), ExitCode.CONFIG)
    except (ledger.LedgerUnavailableError, errors.InternalError, OSError) as error:
        give_up(f"not all is wiped: {error}", ExitCode.FAILED)


@app.command(hidden=True)
def report_failure(
    file: ConfigFile = DEFAULT_CONFIG,
    unit: Annotated[str, typer.Option(help="The service that has failed.")] = "rvmcv-worker.service",
) -> None:
    """Tell RVM-Server that the worker has failed for good: what systemd runs then."""
    from rvmcv_worker import failure_report, log_output, state_lock, unit_result

    log_output.configure("INFO")  # loguru's own way masks no secrets
    try:
        settings, wrong = failure_report.what_it_needs(file)
        state_dir = settings.worker.state_dir
        told = failure_report.report(
            settings,
            redact(wrong or unit_result.why_failed(unit)),
            runs_again=lambda: state_lock.is_held(state_dir) or unit_result.is_active(unit),
        )
    except config.ConfigError as error:
        give_up(f"RVM-Server is not told that the worker has failed: {error}", ExitCode.CONFIG)
    except failure_report.NotReportedError as error:
        give_up(f"RVM-Server is not told that the worker has failed: {error}", ExitCode.FAILED)
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
        token_handover.hand_over(source, load(file).worker.runtime_dir, pid)
    except token_handover.HandoverError as error:
        give_up(f"not handed over, the worker goes on with the token it has: {error}", ExitCode.FAILED)
