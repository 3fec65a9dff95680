"""What the commands of `rvmcv-reference` share: options, tables, and the client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rvmcv_worker.reference.client import Client, ClientError
from rvmcv_worker.reference.state_file import FILE_NAME, State

# A pipe has no width: what reads it wants whole lines.
console = Console(width=None if sys.stdout.isatty() else 250)
errors = Console(stderr=True)

DEFAULT_DATA_DIR = (
    Path(os.environ.get("XDG_STATE_HOME", str(Path.home() / ".local/state"))) / "rvmcv-reference"
)
DataDir = Annotated[Path, typer.Option(help="Where the server keeps everything, its tokens too.")]
Url = Annotated[str | None, typer.Option(help="The server's URL, when it is not on this machine.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file that holds an admin token, with --url.")]


def table_with(*names: str) -> Table:
    """Return a table without lines, with these columns."""
    table = Table(box=None)
    for name in names:
        # What is to be copied is broken into lines, never cut off.
        table.add_column(name, overflow="fold")
    return table


def option_of(text: str) -> tuple[str, Any]:
    """Return name and value of an option that was typed as name=value."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--option")
    return name, Client.parse(value)


def client_of(data_dir: Path, url: str | None, token_file: Path | None) -> Client:
    """Return a client of the server that the options name, by default the one on this machine."""
    if (url is None) != (token_file is None):
        raise ClientError("--url and --token-file go together")
    if url is not None and token_file is not None:
        return Client(url, token_file.read_text().strip())
    state = State.load(data_dir / FILE_NAME)
    if state is None:
        raise ClientError(f"no server has been started on {data_dir}: run `rvmcv-reference serve` first")
    return Client(state.url, state.admin_token)
