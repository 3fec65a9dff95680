"""Known holes in the locked packages, as the advisory database of PyPI or OSV has them, by pip-audit."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit import locked

#: The tool itself comes into a throw-away environment, so that it is no part of what it looks at.
PIP_AUDIT = "pip-audit==2.10.1"


class UnreachableError(Exception):
    """There is no advisory data to compare with; the message says why."""


@dataclass(frozen=True)
class Findings:
    """What the database says of the lock."""

    looked_up: int
    holes: tuple[str, ...]


def look_up(uv: str, service: str) -> Findings:
    """Ask `service` (``pypi``, ``osv``) about every locked package; raises `UnreachableError`."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [uv, "tool", "run", "--from", PIP_AUDIT, "pip-audit", "--requirement", str(locked.LOCK)]
        command += [
            "--disable-pip",
            "--no-deps",
            "--progress-spinner",
            "off",
            "--vulnerability-service",
            service,
        ]
        try:
            ended = subprocess.run(
                [*command, "--format", "json", "--output", str(report)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise UnreachableError(f"{uv} cannot be run: {error.strerror}") from None
        # Its status is 1 for a hole as well as for a broken connection: only the report tells.
        if not report.is_file() or not report.read_text():
            said = (ended.stderr.strip() or "nothing said").splitlines()[-1]
            raise UnreachableError(f"pip-audit ended with {ended.returncode}: {said[:500]}")
        try:
            return judge(json.loads(report.read_text()))
        except (ValueError, KeyError, TypeError):
            raise UnreachableError(
                f"pip-audit ended with {ended.returncode} and no report that can be read"
            ) from None


def judge(report: dict[str, Any]) -> Findings:
    """Return what pip-audit's report says; raises `UnreachableError` for one with packages not looked up.

    An index that has no advisories, as a mirror has not, answers 404 for each: pip-audit calls that a
    success, and nothing was compared.
    """
    packages = report["dependencies"]
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    if skipped or not packages:
        raise UnreachableError(
            f"{len(skipped)} of {len(packages)} packages could not be looked up"
            f"{f', {skipped[0]} among them' if skipped else ''}: the index that was asked has no advisories"
        )
    return Findings(
        looked_up=len(packages),
        holes=tuple(
            f"{each['name']} {each['version']}: {hole['id']}"
            f" ({', '.join(hole['fix_versions']) or 'no release'} mends it)"
            for each in packages
            for hole in each["vulns"]
        ),
    )
