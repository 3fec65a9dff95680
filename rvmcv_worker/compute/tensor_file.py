"""Tensors and plain values as a file of torch's, written so that a full disk is told as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write(content: Any, path: Path, *, to_disk: bool = False) -> None:
    """Write `content` to `path`, whole or not at all; with `to_disk` it outlives a power cut.

    Raises `OSError` where there is no room: torch itself makes a `RuntimeError` of that, about a position.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        # Through an open file: given a path, torch would write its name into the archive.
        with part.open("wb") as stream:
            torch.save(content, stream)
            if to_disk:
                stream.flush()
                os.fsync(stream.fileno())
        part.replace(path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        part.unlink(missing_ok=True)
