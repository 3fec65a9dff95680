"""Fills a directory with all that `install.sh --wheelhouse` needs without internet: `make wheelhouse`.

What is in it is what requirements.lock names, to the hash, for the Python and machine that this runs on.
Where a project has published no wheel its source archive is fetched; install.sh builds it with the locked
setuptools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

SOURCE = Path(__file__).resolve().parents[1]
#: What builds the worker's wheel and others' source archives, and what installs them.
TOOLS = ("hatchling", "setuptools", "uv")
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Stanza:
    """A package of the lock: its name, and its line with the hashes beneath."""

    name: str
    version: str
    text: str

    @property
    def hashes(self) -> frozenset[str]:
        """The sha256 of every file that the lock allows."""
        return frozenset(re.findall(r"sha256:([0-9a-f]{64})", self.text))


def stanzas(lock: str) -> dict[tuple[str, str], Stanza]:
    """Take a lock apart, by name and version."""
    found = {}
    for match in re.finditer(r"^([a-z0-9._-]+)==([^ ;]+).*\n(?:    --hash=.*\n?)+", lock, re.MULTILINE):
        text = re.sub(r" ;.*?(?= \\\n)", "", match.group())  # the marker has been looked at
        found[match.group(1), match.group(2)] = Stanza(match.group(1), match.group(2), text)
    return found


def needed(uv: str, python: str, extras: list[str]) -> list[Stanza]:
    """Ask uv which of the lock's packages this Python needs, tools included."""
    project = [str(SOURCE / "pyproject.toml"), *(f"--extra={extra}" for extra in extras)]
    names = _resolve(uv, python, project) | _resolve(uv, python, ["-"], "\n".join(TOOLS))
    known = stanzas((SOURCE / "requirements.lock").read_text())
    if strangers := sorted(names - known.keys()):
        told = ", ".join(f"{name} {version}" for name, version in strangers)
        raise SystemExit(f"not in requirements.lock: {told}; bring it up to date: make lock")
    return [known[each] for each in sorted(names)]


def _resolve(uv: str, python: str, what: list[str], wanted: str = "") -> set[tuple[str, str]]:
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", python]
    command += ["-c", str(SOURCE / "requirements.lock"), *what]
    run = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"uv could not tell what is needed:\n{run.stderr}")
    return set(re.findall(r"^([a-z0-9._-]+)==([^ ;\n]+)", run.stdout, re.MULTILINE))


def index_of(uv: str) -> str:
    """Return the index that packages come from here: the one that pip is told of, else uv's."""
    if named := os.environ.get("PIP_INDEX_URL"):
        return named.rstrip("/")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--emit-index-url", "-"]
    told = subprocess.run(command, input="", capture_output=True, text=True, check=False).stdout
    if not (match := re.search(r"^--index-url (\S+)$", told, re.MULTILINE)):
        raise SystemExit("uv has no index of packages: name one by PIP_INDEX_URL")
    return match.group(1).rstrip("/")


def published(stanza: Stanza, index: str) -> list[dict[str, Any]]:
    """Ask the index for the files of a package that the lock allows."""
    request = urllib.request.Request(
        f"{index}/{stanza.name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        files = json.load(answer)["files"]
    return [file for file in files if file["hashes"].get("sha256") in stanza.hashes]


def fetch_source(file: dict[str, Any], index: str, directory: Path) -> None:
    """Fetch a source archive by itself: pip would run its code to see what it is."""
    with urllib.request.urlopen(urljoin(f"{index}/", file["url"]), timeout=_ANSWER_S) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != file["hashes"]["sha256"]:
        raise SystemExit(f"{file['filename']}: not the file that requirements.lock names: nothing was kept")
    (directory / file["filename"]).write_bytes(content)


def fetch(python: str, index: str, wanted: list[Stanza], directory: Path) -> None:
    """Fetch every package: wheels by pip, which knows which one this machine takes, the rest by ourselves."""
    with ThreadPoolExecutor(8) as pool:
        files = dict(zip(wanted, pool.map(partial(published, index=index), wanted), strict=True))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        for stanza in wanted:
            if any(file["filename"].endswith(".whl") for file in files[stanza]):
                requirements.write(stanza.text)
            elif files[stanza]:
                fetch_source(files[stanza][0], index, directory)
            else:
                raise SystemExit(
                    f"{index} has no file of {stanza.name} {stanza.version} that the lock allows"
                )
        requirements.flush()
        command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "-d", str(directory), "-r", requirements.name]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("pip could not fetch the wheels (see above)")


def main() -> None:
    """Fill the directory that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--uv", default="uv")
    parser.add_argument("--extra", action="append", default=[], dest="extras")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    wanted = needed(options.uv, sys.executable, options.extras)
    fetch(sys.executable, index_of(options.uv), wanted, options.directory)
    (options.directory / "made-for").write_text(f"{made_for()}\n")
    print(f"{len(wanted)} packages for {made_for()} are in {options.directory}")


def made_for() -> str:
    """Return what the wheels fit, as install.sh compares it."""
    return f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.machine()}"


if __name__ == "__main__":
    main()
