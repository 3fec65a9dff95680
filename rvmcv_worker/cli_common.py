"""What the commands of `rvmcv-worker` share: its configuration, the running worker, how they give up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rvmcv_worker import config
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.logs import redact

if TYPE_CHECKING:
    from rvmcv_worker.control_client import ControlClient

#: Where the installed service keeps its configuration.
DEFAULT_CONFIG = Path("/etc/rvmcv-worker/config.toml")
ConfigFile = Annotated[Path, typer.Option("--config", help="The configuration file.", show_default=True)]


def load(file: Path) -> config.Settings:
    """Return the settings; what cannot be used ends the command."""
    try:
        return config.load(file)
    except config.ConfigError as error:
        give_up(str(error), ExitCode.CONFIG)


def give_up(message: str, code: ExitCode) -> NoReturn:
    """End the command with a message and its exit status."""
    from rich.console import Console

    from rvmcv_worker.terminal import say

    say(Console(stderr=True), redact(message))
    raise typer.Exit(code)


@contextlib.contextmanager
def worker(file: Path, *, answer_s: float | None = None) -> Iterator[ControlClient]:
    """The running worker; what keeps it from answering ends the command."""
    from rvmcv_worker.control_client import ANSWER_S, ControlClient, ControlError

    try:
        yield ControlClient(load(file).worker.runtime_dir, answer_s=answer_s or ANSWER_S)
    except ControlError as error:
        give_up(str(error), error.code)
