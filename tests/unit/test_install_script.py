"""What of install.sh can be tried without a machine to install on: its steps, beneath another root."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from installer import wheelhouse
from rvmcv_worker import __version__, config, doctor

SOURCE = Path(__file__).parents[2]
SCRIPT = SOURCE / "install.sh"
SECRET = "rvm_0123456789abcdef"

needs_system_python = pytest.mark.skipif(
    not os.access("/usr/bin/python3", os.X_OK), reason="install.sh uses /usr/bin/python3, which is not here"
)


def installer(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as it is."""
    return subprocess.run([SCRIPT, *options], capture_output=True, text=True, check=False, timeout=30)


def steps(script: str, root: Path, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run single steps of the script, with everything that they touch beneath `root`."""
    return subprocess.run(
        ["bash", "-c", f'. "{SCRIPT}"; parse_options; {script}'],
        env={"RVMCV_ROOT": str(root), "PATH": os.environ["PATH"]},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run = subprocess.run(
        ["shellcheck", "--external-sources", "--check-sourced", SCRIPT.name],
        cwd=SOURCE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_help_names_every_option_and_exit_status():
    run = installer("--help")
    options = SCRIPT.read_text().partition("parse_options() {")[2].partition("--help | -h)")[0]
    taken = set(re.findall(r"--[a-z][a-z0-9-]+", options))
    assert run.returncode == 0
    assert {"--token-file", "--upgrade", "--uninstall", "--purge", "--wheelhouse", "--cpu"} <= taken
    assert {option for option in taken if not re.search(rf"{option}\b", run.stdout)} == set()
    assert "Exit status: 0" in run.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--token", SECRET), "no option --token"),
        (("--token-file",), "--token-file wants a value"),
        (("--upgrade", "--purge"), "--upgrade and --purge together"),
        (("--s3-access-key-file", "/x"), "--s3-secret-key-file go together"),
        (("--server", "vm100"), "an origin is wanted"),
        (("--server", 'https://vm100"\nurl = "x'), "an origin is wanted"),
        (("--server", "https://user@vm100"), "an origin is wanted"),
        (("--drain-timeout", "soon"), "a whole number of seconds"),
        (("--wheelhouse", "/nowhere"), "make wheelhouse"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_looked_at(options, said):
    run = installer(*options)
    assert (run.returncode, run.stdout) == (2, "")
    assert said in run.stderr
    assert SECRET not in run.stderr


def test_somebody_who_is_not_root_is_told_so(tmp_path):
    run = steps("id() { echo 1000; }; become_the_only_installer", tmp_path)
    assert run.returncode == 1
    assert "needs root" in run.stderr


def test_two_installers_do_not_work_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    run = steps(
        "id() { echo 0; }; become_the_only_installer; "
        "(exec 9>&-; become_the_only_installer) || echo second: $?",
        tmp_path,
    )
    assert run.stdout == "second: 1\n"
    assert "another install.sh is at work" in run.stderr


@pytest.mark.parametrize("package", ["uv", "hatchling", "torch"])
def test_a_stanza_of_the_lock_is_taken_whole_and_alone(package, tmp_path):
    found = steps(f"stanza {package}", tmp_path).stdout
    known = wheelhouse.stanzas((SOURCE / "requirements.lock").read_text())
    wanted = [each for (name, _), each in known.items() if name == package]
    assert set(re.findall(r"sha256:([0-9a-f]{64})", found)) == set().union(*(each.hashes for each in wanted))
    assert re.findall(r"^([a-z]+)==", found, re.MULTILINE) == [package] * len(wanted)
    assert "#" not in found


def test_the_version_is_the_package_s(tmp_path):
    assert steps("source_version", tmp_path).stdout.strip() == __version__


def test_the_drivers_wanted_are_those_that_doctor_wants(tmp_path):
    for cuda, driver in doctor._DRIVER_FOR_CUDA.items():
        assert steps(f"least_driver {cuda}", tmp_path).stdout.strip() == str(driver)
    assert int(steps("locked_cuda", tmp_path).stdout) in doctor._DRIVER_FOR_CUDA


@pytest.mark.parametrize(
    ("told", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release", "580.82.07"),
    ],
)  # fmt: skip
def test_a_driver_is_known_by_what_the_kernel_tells(told, driver, tmp_path):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(f"{told}\nGCC version: gcc version 12.2.0\n")
    assert steps("installed_driver", tmp_path).stdout.strip() == driver
    run = steps("check_driver", tmp_path)
    assert run.returncode == (driver < "580")
    assert ("needs 580" in run.stderr) is (driver < "580")


@pytest.mark.parametrize(
    ("release", "warned"),
    [
        ('ID=ubuntu\nVERSION_ID="24.04"', False),
        ('ID=debian\nVERSION_ID="12"', False),
        ("ID=debian\nPRETTY_NAME=sid", True),
        ('ID=ubuntu\nVERSION_ID="20.04"\nPRETTY_NAME="Ubuntu 20.04"', True),
    ],
)
def test_other_distributions_get_a_warning_and_no_refusal(release, warned, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text(f"{release}\n")
    run = steps("check_distribution", tmp_path)
    assert run.returncode == 0
    assert ("is made for Ubuntu 22.04" in run.stderr) is warned


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "--apparmor-profile"),
    ],
)
def test_what_forbids_user_namespaces_is_told_with_what_to_do(setting, value, advice, tmp_path):
    file = tmp_path / "proc/sys" / setting
    file.parent.mkdir(parents=True)
    file.write_text(f"{value}\n")
    assert advice in steps("wall_advice", tmp_path).stdout


def test_what_is_as_it_should_be_is_not_written_again(tmp_path):
    (tmp_path / "a").write_text("one\n")
    script = 'put_file "$ROOT/a" "$UNITS/rvmcv-worker.service" 0644; put_link releases/1 "$CURRENT"; '
    script += "echo $CHANGES; "
    assert re.findall(r"^\d$", steps(script * 2, tmp_path).stdout, re.MULTILINE) == ["2", "2"]
    assert str((tmp_path / "opt/rvmcv-worker/current").readlink()) == "releases/1"
    (tmp_path / "a").write_text("two\n")
    steps(script.replace("releases/1", "releases/2"), tmp_path)
    assert (tmp_path / "usr/local/lib/systemd/system/rvmcv-worker.service").read_text() == "two\n"
    assert str((tmp_path / "opt/rvmcv-worker/current").readlink()) == "releases/2"


@pytest.mark.parametrize(
    "path",
    ['""', "/", '"$ROOT"', '"$ROOT/opt"',
     '"$OPT/../x"', '"$OPT/."', '"$OPT//"', '"$UNITS"', '"$UNITS/ssh.service"'],
)  # fmt: skip
def test_nothing_is_removed_but_the_worker_s_own(path, tmp_path):
    for kept in ("opt/x", "usr/local/lib/systemd/system/ssh.service", "opt/rvmcv-worker/releases/1/a"):
        (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kept).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    run = steps(f"remove {path}", tmp_path)
    assert (run.returncode, sorted(tmp_path.rglob("*"))) == (1, before)
    assert "not removed" in run.stderr
    assert steps('remove "$OPT"', tmp_path).returncode == 0
    assert not (tmp_path / "opt/rvmcv-worker").exists()


def test_secrets_become_root_s_files_and_stay_what_they_are(tmp_path):
    (tmp_path / "given").write_text(f"{SECRET}\r\n")
    give = 'TOKEN_FILE="$ROOT/given"; gather_secrets; put_secrets'
    assert steps(give, tmp_path).returncode == 0
    file = tmp_path / "etc/rvmcv-worker/credentials/token"
    assert file.read_text() == f"{SECRET}\n"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (file, file.parent)] == [0o600, 0o700]
    for again in ("gather_secrets; put_secrets", give):
        assert steps(f"{again}; echo $CHANGES", tmp_path).stdout == "0\n"
    (tmp_path / "given").write_text("another\n")
    assert "written" in steps(give, tmp_path).stdout
    assert file.read_text() == "another\n"


def test_a_secret_is_read_from_a_file_and_nothing_else(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "a pipe"), (".", "a directory"), ("none", "no such file")):
        run = steps(f'TOKEN_FILE="$ROOT/{name}"; gather_secrets', tmp_path)
        assert run.returncode == 1
        assert said in run.stderr
    (tmp_path / "given").write_text(SECRET)
    (tmp_path / "given").chmod(0o644)
    assert "others may read" in steps('TOKEN_FILE="$ROOT/given"; gather_secrets', tmp_path).stderr


def test_modules_in_the_caller_s_directory_are_not_run(tmp_path):
    (tmp_path / "platform.py").write_text("open('ran', 'w')")
    (tmp_path / "ensurepip.py").write_text("open('ran', 'w')")
    (tmp_path / "made-for").write_text("Python 3.9 on riscv64\n")
    steps(f'cd "{tmp_path}"; missing_packages; WHEELHOUSE="{tmp_path}"; check_wheelhouse', tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_somebody_else_s_is_neither_overwritten_nor_removed(tmp_path):
    others = [
        tmp_path / "usr/local/bin/rvmcv-worker",
        tmp_path / "usr/local/lib/systemd/system/rvmcv-worker-own.service",
    ]
    for file in others:
        file.parent.mkdir(parents=True)
        file.write_text("[Install]\n")
    run = steps("systemctl() { :; }; check_strangers", tmp_path)
    assert run.returncode == 1
    assert "is not the installation's" in run.stderr
    names = steps(
        "MODE=uninstall; systemctl() { [ $1 != is-active ]; }; units_to_enable; remove_worker", tmp_path
    )
    assert names.returncode == 0, names.stderr
    assert "rvmcv-worker-own" not in names.stdout
    assert all(file.exists() for file in others)


def test_a_user_of_that_name_with_another_home_is_refused_and_not_removed(tmp_path):
    given = "getent() { echo rvmcv-worker:x:1000:1000::/home/ani:/bin/bash; }; systemctl() { :; }; "
    run = steps(f"{given} check_strangers", tmp_path)
    assert run.returncode == 1
    assert "/home/ani" in run.stderr
    run = steps(f"{given} userdel() {{ echo gone; }}; purge", tmp_path)
    assert (run.returncode, run.stdout) == (0, "")


def test_a_source_where_the_installation_goes_is_refused(tmp_path):
    run = steps('systemctl() { :; }; SOURCE="$OPT/checkout"; check_strangers', tmp_path)
    assert run.returncode == 1
    assert "move it" in run.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "empty"), ("\n", "empty"), (f"{SECRET} x", "a space"), (f"{SECRET}\n{SECRET}\n", "a second line"),
     ("x" * 9000, "larger than 8192"), (f"{SECRET}ü", "no ASCII")],
)  # fmt: skip
def test_what_cannot_be_a_secret_is_refused_without_being_shown(content, said, tmp_path):
    (tmp_path / "given").write_text(content)
    run = steps('TOKEN_FILE="$ROOT/given"; gather_secrets; put_secrets', tmp_path)
    assert run.returncode == 1
    assert said in run.stderr
    assert SECRET not in run.stdout + run.stderr
    assert not (tmp_path / "etc").exists()


def test_a_fresh_configuration_says_what_the_options_say_and_loads(tmp_path):
    options = "--server https://vm7:8443/ --cpu --without-compute"
    run = steps(f'parse_options {options}; fresh_config "{SOURCE}/config.toml"', tmp_path)
    (tmp_path / "config.toml").write_text(run.stdout)
    settings = config.load(tmp_path / "config.toml")
    assert settings.server.url == "https://vm7:8443"
    assert settings.worker.gpu == "none"
    assert settings.worker.job_types == ("stub",)
    assert (
        steps(f'fresh_config "{SOURCE}/config.toml"', tmp_path).stdout == (SOURCE / "config.toml").read_text()
    )


def test_a_configuration_that_is_there_is_the_operator_s(tmp_path):
    file = tmp_path / "etc/rvmcv-worker/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("mine\n")
    run = steps("SERVER_URL=https://vm7; RELEASE=1; put_config; echo $CHANGES", tmp_path)
    assert (run.stdout, file.read_text()) == ("0\n", "mine\n")
    assert "was left alone" in run.stderr


@needs_system_python
def test_a_release_is_known_by_its_content_and_used_only_when_it_is_whole(tmp_path):
    find = 'find_release; echo "$RELEASE $FINGERPRINT"'
    name, fingerprint = steps(find, tmp_path).stdout.split()
    assert name == __version__
    marker = tmp_path / "opt/rvmcv-worker/releases" / name / "share/rvmcv-worker/whole"
    marker.parent.mkdir(parents=True)
    assert steps(find, tmp_path).stdout.split()[0] == name  # broken off: made anew under its name
    assert steps(f"release_is_whole {name}", tmp_path).returncode == 1
    marker.write_text(f"{fingerprint}\n")
    assert steps(find, tmp_path).stdout.split()[0] == name
    assert steps(f"release_is_whole {name}", tmp_path).returncode == 0
    marker.write_text("another build's\n")
    same = marker.parents[3] / f"{name}+00000000/share/rvmcv-worker/whole"
    same.parent.mkdir(parents=True)
    same.write_text(f"{fingerprint}\n")
    assert steps(find, tmp_path).stdout.split()[0] == f"{name}+00000000"
    same.unlink()
    assert steps(find, tmp_path).stdout.split()[0] == f"{name}+{fingerprint[:8]}"
    other = steps(f"parse_options --without-compute; {find}", tmp_path).stdout.split()[1]
    assert other != fingerprint


def test_only_the_releases_in_use_and_before_are_kept(tmp_path):
    releases = tmp_path / "opt/rvmcv-worker/releases"
    caches = tmp_path / "opt/rvmcv-worker/cache"
    for name in ("1", "2", "3", "4"):
        share = releases / name / "share/rvmcv-worker"
        share.mkdir(parents=True)
        (share / "requirements.lock").write_text("old" if name == "1" else "new")
    run = steps(
        'put_link releases/3 "$CURRENT"; echo 2 >"$OPT/previous"; '
        'for lock in old new; do mkdir -p "$CACHE/$(printf $lock | sha256sum | cut -c -16)"; done; '
        "remove_old_releases",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(each.name for each in releases.iterdir()) == ["2", "3"]
    assert len(list(caches.iterdir())) == 1


@needs_system_python
def test_a_wheelhouse_of_another_python_is_refused(tmp_path):
    check = f'WHEELHOUSE="{tmp_path}"; check_wheelhouse'
    assert "has finished" in steps(check, tmp_path).stderr
    (tmp_path / "made-for").write_text("Python 3.9 on riscv64\n")
    assert "is for Python 3.9 on riscv64" in steps(check, tmp_path).stderr
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "from installer.wheelhouse import made_for; print(made_for())"],
        cwd=SOURCE, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (tmp_path / "made-for").write_text(version)
    assert steps(check, tmp_path).returncode == 0


def test_an_upgrade_takes_its_own_drain_back_and_no_other_wish(tmp_path):
    wish = tmp_path / "operator-wish"
    undo = 'as_worker() { "$@"; }; UPGRADE_STATE_DIR="$ROOT"; UPGRADE_WISH=%s; restore_wish'
    for before, left, after in [
        ("run", "drain", None),
        ("pause", "drain", "pause"),
        ("drain", "drain", "drain"),
        ("run", "pause", "pause"),  # the operator's, meanwhile
    ]:
        wish.write_text(f"{left}\n")
        assert steps(undo % before, tmp_path).returncode == 0
        assert (wish.read_text().strip() if wish.exists() else None) == after
