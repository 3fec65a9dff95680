"""What a server keeps between its starts, and what the command line needs to reach it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "state.json"


@dataclass(frozen=True)
class State:
    """Addresses and secrets of one server. The file is readable by its owner alone."""

    url: str
    worker_token: str
    admin_token: str
    edge_token: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    #: Makes lease tokens; those of running jobs are worthless after it is lost.
    lease_key: str

    @classmethod
    def load(cls, file: Path) -> State | None:
        """Return what was saved; None when nothing was. Raises ValueError for another file's content."""
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a state file of rvmcv-reference ({error}); delete it") from None

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all, with mode 0600."""
        part = file.with_name(f"{file.name}.{os.getpid()}~")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            json.dump(asdict(self), out, indent=2)
        part.replace(file)
