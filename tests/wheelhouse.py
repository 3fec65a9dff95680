"""The directory that `install.sh --wheelhouse` installs from: filled once for each lock, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.debian_root import cache_dir

_SOURCE = Path(__file__).parents[1]
_TIMEOUT_S = 900.0


def cached(*extras: str) -> Path:
    """Return the wheelhouse of this source tree's lock, filled if it is not there."""
    content = b"".join(
        (_SOURCE / name).read_bytes()
        for name in ("requirements.lock", "pyproject.toml", "installer/wheelhouse.py")
    )
    key = hashlib.sha256(content + sys.version.encode()).hexdigest()[:12]
    place = cache_dir() / "-".join(("wheelhouse", *extras, key))
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as directory:
            made = Path(directory) / "wheelhouse"
            uv = Path(sys.executable).with_name("uv")
            argv = [sys.executable, "-m", "installer.wheelhouse", str(made)]
            argv += ["--uv", str(uv if uv.exists() else shutil.which("uv"))]
            argv += [part for extra in extras for part in ("--extra", extra)]
            subprocess.run(argv, cwd=_SOURCE, check=True, timeout=_TIMEOUT_S)
            with contextlib.suppress(OSError):  # another run was faster, and filled it with the same
                made.rename(place)
    return place
