"""The commands of `rvmcv-reference` that ask for inferences and look at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rvmcv_worker.logs import escape
from rvmcv_worker.reference.cli_common import (
    DEFAULT_DATA_DIR,
    DataDir,
    TokenFile,
    Url,
    client_of,
    console,
    option_of,
    table_with,
)
from rvmcv_worker.reference.states import JobStatus
from rvmcv_worker.terminal import plain

app = typer.Typer()
Option = Annotated[
    list[str] | None, typer.Option(help="A further option, name=value; value as JSON or text.")
]


@app.command()
def infer(
    image: Annotated[str, typer.Argument(help="A file to upload (a playground try), or a URL.")],
    model: Annotated[str | None, typer.Option(help="Version, file name or sha256; the active one.")] = None,
    wait_s: Annotated[float, typer.Option(min=0, max=30, help="Wait so long for the result.")] = 10.0,
    option: Option = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Ask for an inference on one image, and print the answer as JSON; `result` looks again."""
    client = client_of(data_dir, url, token_file)
    fields = _fields(model, option)
    if "://" in image:
        answer = client.post(f"/api/v1/cv/inference?wait={wait_s}", {"image_url": image, **fields})
    else:
        answer = client.upload_image(Path(image), fields, wait_s)
    _show(answer)


@app.command()
def result(
    job_id: Annotated[str, typer.Argument(help="What `infer` or `batch` called it.")],
    wait_s: Annotated[float, typer.Option(min=0, max=30, help="Wait so long for an inference.")] = 0.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Look at an inference or a batch again, and print it as JSON."""
    _show(client_of(data_dir, url, token_file).result(job_id, wait_s))


def _show(answer: dict[str, Any]) -> None:
    """Print an answer; the exit status is 1 where there will be no result."""
    console.print_json(data=answer, ensure_ascii=True)
    if answer["status"] in (JobStatus.FAILED.value, JobStatus.CANCELLED.value):
        raise typer.Exit(1)


@app.command()
def batch(
    images: Annotated[str, typer.Argument(help="JSON Lines of id and url: a file, or an s3:// URL.")],
    model: Annotated[str | None, typer.Option(help="Version, file name or sha256; the active one.")] = None,
    option: Option = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Queue a batch and print its id; `result` and the page `/batches` show how far it is."""
    client = client_of(data_dir, url, token_file)
    fields = _fields(model, option)
    if "://" in images:
        answer = client.post("/api/v1/cv/batch-inference", {"manifest_url": images, **fields})
    else:
        answer = client.upload_manifest(Path(images), fields)
    typer.echo(answer["batch_id"])


@app.command()
def alerts(
    everything: Annotated[bool, typer.Option("--all", help="Acknowledged ones too.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """List what people should know of, newest first."""
    query = "" if everything else "&acknowledged=false"
    page = client_of(data_dir, url, token_file).get(f"/api/v1/cv/alerts?per_page=50{query}")
    table = table_with("#", "kind", "about", "what", "since")
    for alert in page["data"]:
        about = alert["job_id"] or alert["worker_id"]
        cells = (alert["id"], alert["kind"], about, alert["message"], alert["created_at"])
        table.add_row(*(plain(cell) for cell in cells))
    console.print(table)


@app.command()
def acknowledge(
    alert_id: int, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token_file: TokenFile = None
) -> None:
    """Note that somebody has seen to an alert."""
    client = client_of(data_dir, url, token_file)
    alert = client.post(f"/api/v1/cv/alerts/{alert_id}/acknowledge", None)
    typer.echo(escape(f"{alert['kind']} {alert['id']} is acknowledged by {alert['acknowledged_by']}"))


def _fields(model: str | None, option: list[str] | None) -> dict[str, Any]:
    return {"model_version": model, **dict(option_of(text) for text in option or [])}
