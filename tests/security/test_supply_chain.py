"""What the worker is made of: locked by hash, of known licences, and never added to while it runs."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest

from audit import advisories, licences, locked
from tests.child_fixtures import Runner, spawner, wall, walled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["spawner", "wall", "walled"]

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def wheel(directory: Path, code: str = "") -> Path:
    """Make a wheel whose module is `code`."""
    about = "rvmcv_tiny-1.0.dist-info"
    path = directory / "rvmcv_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rvmcv_tiny.py", code)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: rvmcv-tiny\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in archive.namelist()))
    return path


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    assert found, "`make setup` installs by uv"
    return found


def test_every_entry_of_the_lock_has_hashes_and_names_no_place() -> None:
    entries = locked.read(LOCK)
    assert len(entries) > 150
    assert [entry for entry in entries if not entry.hashes] == []
    assert {(how, len(digits)) for entry in entries for how, digits in entry.hashes} == {("sha256", 64)}
    assert "://" not in re.sub(r"(?m)#.*$", "", LOCK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {locked.normal(re.split(r"[\[<>=;]", each)[0]) for each in declared}
    assert len(names) > 30
    assert names <= {entry.name for entry in entries}


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://packages.example/simple",
        "--extra-index-url https://packages.example/simple",
        "torch @ https://packages.example/torch.whl",
        "-e .",
        "git+https://host.example/torch.git",
        "torch>=2.10",
    ],
)
def test_a_lock_that_leads_elsewhere_is_seen(line: str) -> None:
    with pytest.raises(locked.LockError, match="not a package pinned to a version"):
        locked.read(f"{LOCK}\n{line}\n")


def test_make_installs_by_hash_and_locks_what_is_old_enough() -> None:
    def commands(target: str) -> str:
        return subprocess.run(
            ["make", "--dry-run", "--always-make", target],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert re.search(r"pip install .*--require-hashes -r requirements\.lock", commands("setup"))
    command = re.search(r'--exclude-newer "\$\((.*?)\)"', commands("lock"))
    assert command
    newest = subprocess.run(
        ["sh", "-c", command[1]], check=True, capture_output=True, text=True
    ).stdout.strip()
    age = dt.datetime.now(dt.timezone.utc) - dt.datetime.fromisoformat(newest.replace("Z", "+00:00"))
    assert abs(age - dt.timedelta(days=14)) < dt.timedelta(hours=2)


def test_a_package_that_was_swapped_is_not_installed(uv: str, tmp_path: Path) -> None:
    """Somebody who has the index, or the way to it, serves other bytes under the locked version."""
    marker = tmp_path / "marker"
    good = hashlib.sha256(wheel(tmp_path).read_bytes()).hexdigest()
    with_hash, without = tmp_path / "locked.txt", tmp_path / "unlocked.txt"
    with_hash.write_text(f"rvmcv-tiny==1.0 --hash=sha256:{good}\n")
    without.write_text("rvmcv-tiny==1.0\n")

    def install(requirements: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            uv,
            "--no-config",
            "pip",
            "install",
            "--no-index",
            "--find-links",
            str(tmp_path),
            "--no-cache",
        ]
        command += [
            "--python",
            sys.executable,
            "--target",
            str(tmp_path / name),
            *options,
            "-r",
            str(requirements),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )

    def run(name: str) -> None:
        subprocess.run([sys.executable, "-c", "import rvmcv_tiny"], cwd=tmp_path / name, check=True)

    assert install(with_hash, "genuine", "--require-hashes").returncode == 0
    wheel(tmp_path, code=f"open({str(marker)!r}, 'w')")

    refused = install(with_hash, "swapped", "--require-hashes")
    assert refused.returncode != 0
    assert "ash mismatch" in refused.stderr
    assert not list(tmp_path.glob("swapped/rvmcv_tiny*"))
    assert "must have a hash" in install(without, "unhashed", "--require-hashes").stderr

    run("genuine")
    assert not marker.exists()
    assert install(without, "plain").returncode == 0
    run("plain")
    assert marker.exists(), "the attack is none: this test shows nothing"


#: Tries to leave a file in everything that Python imports from, and to write to Python itself.
_WRITE = """
import os, sys, sysconfig
def can_write(place):
    try:
        if os.path.isdir(place):
            os.close(os.open(place + "/" + NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(place + "/" + NAME)
        else:
            os.close(os.open(place, os.O_RDWR))
    except OSError:
        return False
    return True
import importlib.util, rvmcv_worker
torch = importlib.util.find_spec("torch").origin
places = [*filter(os.path.isdir, sys.path), sys.prefix, sys.prefix + "/bin", sysconfig.get_path("purelib")]
places += [os.path.dirname(rvmcv_worker.__file__), os.path.dirname(torch), torch]
"""


@pytest.mark.slow
def test_what_a_child_imports_is_read_only_to_it(walled: Runner, tmp_path: Path) -> None:
    written = _WRITE.replace("NAME", repr(f"rvmcv-attack-{uuid.uuid4().hex}"))
    answer = walled.script(
        f"{written}\nanswer(places=len(places), written=[p for p in places if can_write(p)])"
    )
    assert answer["written"] == []
    assert answer["places"] > 6

    outside = subprocess.run(
        [sys.executable, "-c", f"{written}\nprint([p for p in places if can_write(p)])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "site-packages" in outside.stdout, "the attack is none: this test shows nothing"


@pytest.mark.slow
def test_no_package_is_installed_behind_the_wall(walled: Runner, tmp_path: Path) -> None:
    """Even one that came with the job: a wheel in a data set."""
    shutil.copy(wheel(tmp_path), walled.workspace.in_dir)
    body = """
import subprocess, importlib
command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--break-system-packages"]
done = subprocess.run([*command, "/job/in/" + job["wheel"]], capture_output=True, text=True)
try:
    importlib.import_module("rvmcv_tiny")
    found = True
except ImportError:
    found = False
answer(status=done.returncode, said=done.stderr[-300:], found=found)
"""
    answer = walled.script(body, wheel=wheel(tmp_path).name)
    assert (answer["status"] != 0, answer["found"]) == (True, False)
    assert re.search(r"Read-only file system|not writeable|No module named pip|Permission", answer["said"])

    # Where the environment can be written to, the same command does it.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    command = [sys.executable, "-m", "pip", "--python", str(tmp_path / "env/bin/python"), "install"]
    command += ["--no-index", "--no-deps", str(wheel(tmp_path))]
    subprocess.run(command, check=True, capture_output=True)
    assert list((tmp_path / "env").rglob("rvmcv_tiny.py"))


#: Has Ultralytics look for a package that is not there, as one undecodable image makes it do.
_MISSING_PACKAGE = """
import sys
from pathlib import Path
from rvmcv_worker.compute import ultralytics_env
ultralytics_env.isolate(Path(sys.argv[1]))
from ultralytics.utils import checks
checks.ONLINE = True  # a machine that reaches an index, so that the switch alone decides
def hook(event, arguments):
    if event == "subprocess.Popen" and "install" in arguments[1]:
        print("STARTED", *arguments[1])
        raise OSError("not in this test")
sys.addaudithook(hook)
print("isolated:", checks.check_requirements("rvmcv-no-such-package"))
checks.AUTOINSTALL = True  # Ultralytics' default
print("by default:", checks.check_requirements("rvmcv-no-such-package"))
"""


@pytest.mark.slow
def test_ultralytics_installs_nothing(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _MISSING_PACKAGE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    ).stdout
    isolated, by_default = said.split("isolated: False")
    assert "STARTED" not in isolated
    assert re.search(r"STARTED .*pip install .*rvmcv-no-such-package", by_default), by_default


def test_the_licences_of_all_packages_go_with_ours() -> None:
    packages = licences.table()
    assert len(packages) > 100
    assert licences.faults(packages) == []
    assert {each.name for each in packages if each.why_not and each.excused} <= {
        each.name for each in packages if each.name.startswith(("nvidia-", "cuda-")) or each.name == "regex"
    }


@pytest.mark.parametrize(
    ("expression", "compatible"),
    [
        ("MIT", True),
        ("GPL-2.0-only", False),
        ("GPL-2.0-only OR MIT", True),
        ("GPL-2.0-only AND MIT", False),
        ("MIT AND Apache-2.0 WITH LLVM-exception", True),
        ("(GPL-2.0-only OR MIT OR ISC) AND GPL-2.0-only", False),
        ("(Apache-2.0 OR MIT) AND ISC", True),
        ("LicenseRef-NVIDIA-Proprietary", False),
        ("", False),
    ],
)
def test_an_expression_is_judged(expression: str, compatible: bool) -> None:
    assert (licences.judge(expression) is None) is compatible


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: GPL-2.0-only\nLicense: MIT", "GPL-2.0-only"),
        ("License: GPL 2", "GPL 2"),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT"),
        (
            "Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: Free for home use",
            None,
        ),
        ("License: Do what we say,\n        and no more", None),
        ("", None),
    ],
)
def test_a_licence_is_read_from_what_a_package_says(
    tmp_path: Path, metadata: str, licence: str | None
) -> None:
    about = tmp_path / "odd-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: odd\nVersion: 1.0\n{metadata}\n")
    assert licences.declared(importlib.metadata.Distribution.at(about)) == licence


def package(name: str, *holes: str) -> dict[str, Any]:
    return {
        "name": name,
        "version": "1.0",
        "vulns": [{"id": hole, "fix_versions": ["1.1"]} for hole in holes],
    }


def fake_uv(directory: Path, report: object | None, status: int) -> str:
    """Stand in for what would fetch pip-audit and ask the internet; the answer is what pip-audit writes."""
    script = directory / "uv"
    answer = "" if report is None else f"import json; json.dump({report!r}, open(sys.argv[-1], 'w'))"
    said = "print('ConnectionError: no', file=sys.stderr)"
    script.write_text(f"#!{sys.executable}\nimport sys\n{answer}\n{said}\nsys.exit({status})\n")
    script.chmod(0o700)
    return str(script)


def test_known_holes_are_told_with_what_mends_them(tmp_path: Path) -> None:
    uv = fake_uv(tmp_path, {"dependencies": [package("torch", "CVE-1"), package("ruff")]}, 1)
    found = advisories.look_up(uv, "pypi")
    assert found == advisories.Findings(2, ("torch 1.0: CVE-1 (1.1 mends it)",))


@pytest.mark.parametrize(
    ("report", "status", "said"),
    [
        (None, 1, "pip-audit ended with 1: ConnectionError: no"),
        (["another form"], 0, "no report that can be read"),
        ({"dependencies": []}, 0, "0 of 0 packages"),
        # What it makes of an index that answers 404 to every question: status 0, "no known holes".
        (
            {"dependencies": [package("ruff"), {"name": "torch", "skip_reason": "not found"}]},
            0,
            "1 of 2 packages",
        ),
    ],
)
def test_what_was_not_compared_is_not_called_good(
    tmp_path: Path, report: object | None, status: int, said: str
) -> None:
    with pytest.raises(advisories.UnreachableError, match=said):
        advisories.look_up(fake_uv(tmp_path, report, status), "pypi")


def audit(uv: str, sbom: Path, service: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "audit", "--uv", uv, "--sbom", str(sbom), "--service", service]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("report", "service", "status", "said"),
    [
        ({"dependencies": [package("torch", "CVE-1")]}, "pypi", 1, "1 known holes"),
        ({"dependencies": [package("torch")]}, "pypi", 0, "0 known holes"),
        (None, "pypi", 3, "advisories: NOT COMPARED, pypi cannot be reached"),
        (None, "none", 0, "advisories: NOT compared, as was asked"),
    ],
)
def test_the_audits_status_tells(
    tmp_path: Path, report: dict[str, Any] | None, service: str, status: int, said: str
) -> None:
    uv = fake_uv(tmp_path, report, 0)
    ended = audit(uv, tmp_path / "sbom", service)
    assert (ended.returncode, said in ended.stdout) == (status, True), ended.stdout[-500:] + ended.stderr


@pytest.mark.parametrize("service", ["pypi", "none"])
def test_an_audit_that_cannot_be_done_is_told_from_one_that_found_something(
    tmp_path: Path, service: str
) -> None:
    ended = audit(str(tmp_path / "no-uv"), tmp_path / "sbom", service)
    assert ended.returncode == 3, ended.stderr
    assert "bill of materials: NOT WRITTEN" in ended.stdout
    assert ("no-uv cannot be run" in ended.stdout) == (service == "pypi")
