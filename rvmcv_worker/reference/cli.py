"""The command `rvmcv-reference`: run the server, and try it by hand."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from rvmcv_worker.logs import escape
from rvmcv_worker.reference.cli_common import (
    DEFAULT_DATA_DIR,
    DataDir,
    TokenFile,
    Url,
    client_of,
    console,
    errors,
    option_of,
    table_with,
)
from rvmcv_worker.reference.cli_inference import app as inference
from rvmcv_worker.reference.client import ClientError
from rvmcv_worker.reference.settings import Gate, Settings, Timing
from rvmcv_worker.reference.state_file import FILE_NAME
from rvmcv_worker.terminal import plain

app = typer.Typer(
    help="The reference RVM-Server: what rvmcv-worker is tried, tested and integrated against.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(inference)


class AbilityName(str, Enum):
    """What a token may do."""

    worker = "worker"
    admin = "admin"
    edge = "edge"


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; presigned URLs name it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.")] = 8100,
    s3_port: Annotated[int, typer.Option(help="Port of the embedded store; 0 takes a free one.")] = 0,
    database_url: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL, for example postgresql+psycopg://…; SQLite without.")
    ] = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(help="A MinIO instead of the embedded store; keys by environment.")
    ] = None,
    s3_access_key: Annotated[str | None, typer.Option(envvar="RVMCV_S3_ACCESS_KEY")] = None,
    s3_secret_key: Annotated[str | None, typer.Option(envvar="RVMCV_S3_SECRET_KEY")] = None,
    lease_key: Annotated[
        str | None, typer.Option(envvar="RVMCV_LEASE_KEY", help="64 hex digits; the same for each server.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    as_today: Annotated[bool, typer.Option(help="Copy the faults of today's RVM-Server.")] = False,
    gates: Annotated[str, typer.Option(help="Gates before upload-model: nginx,php,mimes.")] = "",
    auto_activate: Annotated[bool, typer.Option(help="Activate a model that was proven better.")] = False,
    redirect_downloads: Annotated[bool, typer.Option(help="Answer download-model with a 302.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a batch that one job gets.")] = 10_000,
    webhook_url: Annotated[
        str | None, typer.Option(help="Alerts are POSTed there; signed, if RVMCV_WEBHOOK_SECRET is set.")
    ] = None,
    lease_s: Annotated[float, typer.Option(help="Lease of a training.")] = 900.0,
    report_interval_s: Annotated[float, typer.Option(help="Least time between progress reports.")] = 2.0,
    status_idle_s: Annotated[float, typer.Option(help="Worker-status interval, idle.")] = 10.0,
    status_busy_s: Annotated[float, typer.Option(help="Worker-status interval, busy.")] = 3.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once it listens: addresses and tokens, JSON, mode 0600.")
    ] = None,
) -> None:
    """Run the server until SIGINT or SIGTERM."""
    # Here, since the other commands need none of it and should answer at once.
    from rvmcv_worker.reference.server import ReferenceServer

    timing = Timing(
        lease_train_s=lease_s,
        report_interval_s=report_interval_s,
        status_idle_s=status_idle_s,
        status_busy_s=status_busy_s,
    )
    settings = Settings(
        timing=timing,
        as_today=as_today,
        gates=_gates(gates),
        auto_activate=auto_activate,
        redirect_downloads=redirect_downloads,
        shard_size=shard_size,
        webhook_url=webhook_url,
        # From the environment alone: a command line is read by everyone on the machine.
        webhook_secret=os.environ.get("RVMCV_WEBHOOK_SECRET") or None,
    )
    signals = {signal.SIGINT, signal.SIGTERM}
    # Blocked before any thread is made, so that only `sigwait` below receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = ReferenceServer(
        data_dir,
        settings=settings,
        database_url=database_url,
        host=host,
        port=port,
        s3_endpoint=s3_endpoint,
        s3_access_key=s3_access_key,
        s3_secret_key=s3_secret_key,
        s3_port=s3_port,
        lease_key=lease_key,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    with server:
        if ready_file is not None:
            server.state.save(ready_file)
        console.print(f"RVM-Server (reference) on [bold]{server.url}[/], jobs on {server.url}/jobs")
        console.print(f"store on {server.s3_endpoint}, tokens and keys in {server.data_dir / FILE_NAME}")
        signal.sigwait(signals)


@app.command()
def token(
    ability: Annotated[AbilityName, typer.Option(help="What it may do.")],
    name: Annotated[str, typer.Option(help="Whose it is, for example vm102.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Make a token and print it, this once."""
    client = client_of(data_dir, url, token_file)
    made = client.post("/api/v1/cv/tokens", {"name": name, "abilities": [ability.value]})
    # Bare, so that it can be piped into a file.
    typer.echo(made["token"])


@app.command()
def train(
    dataset: Annotated[
        str, typer.Argument(help="An archive to upload, an s3:// or https:// URL, or a data set's id.")
    ],
    job_type: Annotated[
        str, typer.Option(help="yolo11, or sam2 for masks: polygons of YOLO, or COCO JSON.")
    ] = "yolo11",
    base_model: Annotated[
        str | None,
        typer.Option(help="Version, file name or sha256; for none, yolo11n.yaml or scratch."),
    ] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    img_size: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    priority: Annotated[int, typer.Option(help="Higher is sooner.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="A further option, name=value; value as JSON or text.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Queue a training and print its id."""
    client = client_of(data_dir, url, token_file)
    fields: dict[str, Any] = {
        "job_type": job_type,
        "base_model": base_model,
        "epochs": epochs,
        "img_size": img_size,
        "batch_size": batch_size,
        "priority": priority,
        "options": dict(option_of(text) for text in option or []),
    }
    if dataset.isdecimal():
        fields["dataset_id"] = int(dataset)
    elif "://" in dataset:
        fields["dataset_url"] = dataset
    else:
        fields["dataset_id"] = client.upload_dataset(Path(dataset))["dataset_id"]
    typer.echo(client.post("/api/v1/cv/train", fields)["job_id"])


@app.command()
def jobs(data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token_file: TokenFile = None) -> None:
    """List trainings, newest first."""
    page = client_of(data_dir, url, token_file).get("/api/v1/cv/training-jobs?per_page=50")
    table = table_with("job", "type", "status", "progress", "attempt", "error", "created")
    for job in page["data"]:
        done = "" if job["fraction"] is None else f"{100 * job['fraction']:.0f} % {job['phase'] or ''}"
        cells = (job["job_id"], job["job_type"], job["status"], done, job["attempt"] or "")
        table.add_row(*(plain(c) for c in (*cells, job["error_code"] or "", job["created_at"])))
    console.print(table)


@app.command()
def cancel(
    job_id: str, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token_file: TokenFile = None
) -> None:
    """Cancel a job, or every job of a batch."""
    typer.echo(client_of(data_dir, url, token_file).cancel(job_id)["status"])


@app.command()
def models(data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token_file: TokenFile = None) -> None:
    """List models, newest first."""
    table = table_with("id", "name", "version", "MB", "state", "sha256")
    for model in client_of(data_dir, url, token_file).get("/api/v1/cv/models"):
        state = "active" if model["is_active"] else "" if model["usable"] else "unfinished"
        cells = (model["id"], model["model_name"], model["version"], model["file_size_mb"], state)
        table.add_row(*(plain(cell) for cell in (*cells, model["sha256_hash"])))
    console.print(table)


@app.command()
def add_model(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option(help="yolo11 or sam2.")] = "yolo11",
    version: Annotated[str | None, typer.Option(help="The file's name without.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Store a base model, so that trainings can name it, and print its id."""
    client = client_of(data_dir, url, token_file)
    typer.echo(client.upload_model(file, name, version or file.name)["data"]["model_id"])


@app.command()
def activate(
    model_id: int, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token_file: TokenFile = None
) -> None:
    """Make a model the active one of its name; an older one too, which is a roll-back."""
    model = client_of(data_dir, url, token_file).post(f"/api/v1/cv/models/{model_id}/activate", None)
    typer.echo(escape(f"{model['model_name']} {model['version']} is active"))


def _gates(names: str) -> frozenset[Gate]:
    try:
        return frozenset(Gate(name.strip()) for name in names.split(",") if name.strip())
    except ValueError as error:
        known = ", ".join(gate.value for gate in Gate)
        raise typer.BadParameter(f"{error}; the gates are {known}", param_hint="--gates") from None


def main() -> None:
    """Run the command; errors that a person can act on come without a traceback."""
    try:
        app()
    except (ClientError, OSError, ValueError) as error:
        errors.print(Text.assemble(("error: ", "red"), plain(error)), soft_wrap=True, highlight=False)
        sys.exit(1)
