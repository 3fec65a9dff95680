"""`python -m audit`: the licences as a table, the bill of materials as a file, known holes as a list."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from audit import advisories, licences

#: CycloneDX's own tool for Python, in a throw-away environment.
_CYCLONEDX = "cyclonedx-bom==7.5.0"
_FOUND, _UNDONE = 1, 3


def main() -> int:
    """Return 0 when nothing is wrong, 1 for something found, 3 for a part that could not be done."""
    parser = argparse.ArgumentParser(prog="make audit", description=__doc__)
    parser.add_argument("--uv", default="uv", help="uv's command")
    parser.add_argument("--sbom", type=Path, default=Path("sbom.cdx.json"), help="CycloneDX file to write")
    parser.add_argument("--service", choices=("pypi", "osv", "none"), default="pypi")
    parser.add_argument("--licences-only", action="store_true")
    wanted = parser.parse_args()

    packages = licences.table()
    print(*licences.lines(packages), sep="\n")
    found = licences.faults(packages)
    print(f"\nlicences: {len(packages)} packages, {len(found)} that do not go with AGPL-3.0-or-later")
    print(*found, sep="\n")
    if wanted.licences_only:
        return _FOUND if found else 0

    otherwise = 0
    try:
        write_sbom(wanted.uv, wanted.sbom)
        print(f"bill of materials: {wanted.sbom}")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"bill of materials: NOT WRITTEN: {error}")
        otherwise = _UNDONE

    if wanted.service == "none":
        print("advisories: NOT compared, as was asked")
        return _FOUND if found else otherwise
    try:
        known = advisories.look_up(wanted.uv, wanted.service)
    except advisories.UnreachableError as error:
        print(f"advisories: NOT COMPARED, {wanted.service} cannot be reached: {error}")
        print("try again with the internet, or SERVICE=osv, or leave them out by SERVICE=none")
        return _FOUND if found else _UNDONE
    print(f"advisories: {known.looked_up} packages looked up, {len(known.holes)} known holes")
    print(*known.holes, sep="\n")
    return _FOUND if found or known.holes else otherwise


def write_sbom(uv: str, file: Path) -> None:
    """Write what is installed here as CycloneDX JSON, checked against its schema."""
    root = Path(__file__).parents[1]
    command = [uv, "tool", "run", "--from", _CYCLONEDX, "cyclonedx-py", "environment", sys.executable]
    command += [
        "--pyproject",
        str(root / "pyproject.toml"),
        "--output-reproducible",
        "--output-file",
        str(file),
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
