"""`docs/operations.md` and its Indonesian twin say the same, and what they name is there."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import typer.core
import typer.main

from rvmcv_worker import cli
from rvmcv_worker.config import Settings, tomllib
from rvmcv_worker.errors import CODES
from rvmcv_worker.events import Event
from rvmcv_worker.exit_codes import ExitCode
from rvmcv_worker.protocol import WorkerState

ROOT = Path(__file__).parents[2]
ENGLISH, INDONESIAN = ROOT / "docs/operations.md", ROOT / "docs/operations.id.md"
INSTALLER = ROOT / "install.sh"
#: Where what the installer and the units do stands.
SOURCES = (INSTALLER, *sorted((ROOT / "installer").glob("*")), *sorted((ROOT / "systemd").glob("*")))
EVENTS = {event.value for event in Event}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def slug(title: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Section:
    """A heading and what follows it up to the next one."""

    title: str
    level: int
    text: str

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        return _BLOCK.findall(self.text)

    @cached_property
    def prose(self) -> str:
        return _BLOCK.sub("", self.text)

    @cached_property
    def spans(self) -> Counter[str]:
        return Counter(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose))

    @cached_property
    def rows(self) -> list[list[str]]:
        lines = [line.strip().strip("|") for line in self.prose.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")] for line in lines]

    @cached_property
    def links(self) -> list[str]:
        return _LINK.findall(self.prose)


def read(page: Path) -> list[Section]:
    """Cut a page at its headings, those in code blocks apart."""
    text = page.read_text(encoding="utf-8")
    quiet = _BLOCK.sub(lambda found: re.sub(r"[^\n]", ".", found.group()), text)
    starts = [
        (found.start(), found.end(), *found.groups())
        for found in re.finditer(r"^(#+) (.+)$", quiet, re.MULTILINE)
    ]
    ends = [start for start, *_ in starts[1:]] + [len(text)]
    return [
        Section(title, len(marks), text[head:end])
        for (_, head, marks, title), end in zip(starts, ends, strict=True)
    ]


SECTIONS = read(ENGLISH)
TITLES = [slug(section.title) for section in SECTIONS]
SPANS = sorted({span for section in SECTIONS for span in section.spans})
BLOCKS = [(section.title, *block) for section in SECTIONS for block in section.blocks]
LINES = [line for _, kind, text in BLOCKS if not kind for line in text.splitlines()]
#: What the page has somebody type.
TYPED = [*LINES, *SPANS]


def section(title: str) -> Section:
    (found,) = [each for each in SECTIONS if each.title == title]
    return found


def test_both_languages_have_the_same_sections() -> None:
    assert [each.level for each in read(INDONESIAN)] == [each.level for each in SECTIONS]


@pytest.mark.parametrize("number", range(len(SECTIONS)), ids=[each.title for each in SECTIONS])
def test_a_section_names_the_same_in_both_languages(number: int) -> None:
    twins = read(INDONESIAN)
    here, there = SECTIONS[number], twins[number]
    assert there.blocks == here.blocks
    assert [len(row) for row in there.rows] == [len(row) for row in here.rows]
    for row, twin in zip(here.rows, there.rows, strict=True):
        assert [re.findall(r"`[^`]+`", cell) for cell in twin] == [
            re.findall(r"`[^`]+`", cell) for cell in row
        ]
    assert there.spans == here.spans
    titles = [slug(each.title) for each in twins]

    def shared(links: list[str], own: list[str]) -> Counter[object]:
        """Links as both pages have them: those within the page by the heading's number."""
        kept = (link for link in links if not link.startswith("operations."))
        return Counter(own.index(link[1:]) if link.startswith("#") else link for link in kept)

    assert shared(there.links, titles) == shared(here.links, TITLES)


@pytest.mark.parametrize("page", [ENGLISH, INDONESIAN], ids=["en", "id"])
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in (link for each in read(page) for link in each.links):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert link.startswith("https://") or target.exists(), link
        if anchor:
            assert anchor in {slug(each.title) for each in read(target)}, link


def command_line(words: list[str]) -> list[str] | None:
    """What follows `rvmcv-worker` where that is the command that is typed, perhaps by sudo."""
    if words[:1] == ["sudo"]:
        words = words[1:]
    return words[1:] if words[:1] == ["rvmcv-worker"] else None


def typed_commands() -> list[tuple[str, list[str]]]:
    found = []
    for text in TYPED:
        first = text.split("|")[0] if "|" in text else text
        if "rvmcv-worker" in first and (words := command_line(shlex.split(first.replace("'", "")))):
            found.append((text, words))
    return found


@pytest.mark.parametrize(("text", "words"), typed_commands(), ids=[text for text, _ in typed_commands()])
def test_every_command_and_option_of_the_worker_is_there(text: str, words: list[str]) -> None:
    command = typer.main.get_command(cli.app)
    while isinstance(command, typer.core.TyperGroup) and words:
        assert words[0] in command.commands, text
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, text


def test_the_commands_are_looked_at() -> None:
    assert {words[0] for _, words in typed_commands()} >= {
        "cancel", "config", "doctor", "drain", "logs", "pause", "resume", "run", "status", "wipe",
    }  # fmt: skip


def test_every_option_of_the_installer_is_there_and_told() -> None:
    shown = subprocess.run(["bash", INSTALLER, "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z][a-z0-9-]+", shown.stdout))
    typed = [text for text in TYPED if "install.sh" in text]
    told = [row[0] for row in section("Installing").rows]
    named = set(re.findall(r"(?<!\w)--[a-z][a-z0-9-]+", " ".join([*typed, *told])))
    assert named == known


def test_every_key_of_the_configuration_is_there() -> None:
    keys = [found.groups() for span in SPANS if (found := re.fullmatch(r"\[(\w+)\] (\w+)", span))]
    assert len(keys) > 12
    for table, key in keys:
        assert key in getattr(Settings(), table).__class__.model_fields, (table, key)


def test_every_configuration_shown_can_be_used() -> None:
    shown = [text for _, kind, text in BLOCKS if kind == "toml"]
    assert shown
    for text in shown:
        Settings.model_validate(tomllib.loads(text))


def test_every_event_is_one() -> None:
    families = {name.split(".")[0] for name in EVENTS}
    named = {span for span in SPANS if re.fullmatch(r"[a-z]+\.[a-z_]+", span)}
    named = {name for name in named if name.split(".")[0] in families and not name.endswith(".sock")}
    assert len(named) > 20
    assert named <= EVENTS


def test_every_state_and_exit_status_is_told() -> None:
    assert [row[0].strip("`") for row in section("States").rows[2:]] == [state.value for state in WorkerState]
    told = section("By exit status")
    statuses = {int(number) for number in re.findall(r"\b\d+\b", "\n".join(told.spans) + told.prose)}
    assert {int(code) for code in ExitCode} <= statuses


def test_every_error_code_is_one() -> None:
    codes = {row[0].strip("`") for row in section("By error code").rows[2:]}
    assert codes
    assert codes <= set(CODES)


def test_every_path_of_ours_is_one_that_is_made_or_read() -> None:
    ours = (
        "/opt/rvmcv-worker",
        "/etc/rvmcv-worker",
        "/var/lib/rvmcv-worker",
        "/run/rvmcv-worker",
        "/usr/local",
    )
    named = [span for span in SPANS if span.startswith(ours)]
    assert len(named) > 12
    code = sorted((ROOT / "rvmcv_worker").glob("*.py"))
    known = "\n".join(file.read_text(encoding="utf-8") for file in (*SOURCES, *code))
    for path in named:
        (last,) = re.findall(r"([^/]+?)(?:\.new)?/?$", path.replace("<version>/", ""))
        assert last in known, path


def test_every_unit_is_one() -> None:
    named = set(
        re.findall(r"rvmcv-worker[\w-]*\.(?:service|timer)(?!\.d)", ENGLISH.read_text(encoding="utf-8"))
    )
    assert named
    assert named <= {file.name for file in (ROOT / "systemd").iterdir()}


def test_every_target_of_make_is_there() -> None:
    named = {line.split()[1] for line in TYPED if line.startswith("make ")}
    assert "wheelhouse" in named
    assert named <= set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_every_json_shown_is_json() -> None:
    shown = [text for _, kind, text in BLOCKS if kind == "json"]
    assert len(shown) == 3
    for text in shown:
        json.loads(text)


def test_nothing_but_ssh_of_ops_reaches_the_worker_by_the_policy_shown() -> None:
    policy = next(json.loads(text) for _, kind, text in BLOCKS if kind == "json")
    reach = {
        (source, target, port)
        for grant in policy["grants"]
        for source, target, port in itertools.product(grant["src"], grant["dst"], grant["ip"])
    }
    assert {each for each in reach if each[1] == "tag:cv-worker"} == {
        ("group:ops", "tag:cv-worker", "tcp:22")
    }
    assert {each[1:] for each in reach if each[0] == "tag:cv-worker"} == {
        ("tag:rvm-server", "tcp:443"), ("tag:minio", "tcp:9000"),
    }  # fmt: skip
    known = {*policy["tagOwners"], *policy["groups"]}
    assert {name for each in reach for name in each[:2]} <= known


def test_the_disk_is_added_up_from_the_defaults() -> None:
    defaults, total = Settings().limits.model_dump(), 0.0
    for part, gigabytes, _ in section("Disk").rows[2:]:
        if found := re.fullmatch(r"`\[limits\] (\w+)`", part):
            assert float(gigabytes) == defaults[found.group(1)], part
        total += float(gigabytes)
    assert f"That is {total:g} GB" in section("Disk").prose


def test_what_was_measured_is_what_the_results_say() -> None:
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    for figure in ("35.2", "0.40", "2.04", "0.32"):
        assert figure in section("Jobs an hour").prose
        assert figure in results


@pytest.mark.skipif(
    shutil.which("nft") is None or os.geteuid() != 0, reason="needs nft, and root to ask the kernel"
)
def test_the_firewall_shown_is_taken(tmp_path: Path) -> None:
    (rules,) = [text for _, kind, text in BLOCKS if kind == "nft"]
    file = tmp_path / "vm102.nft"
    file.write_text(rules.replace('skuid "rvmcv-worker"', "skuid 990"))
    subprocess.run(["nft", "--check", "--file", file], check=True)
