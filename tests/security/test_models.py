"""Models that are not what their name says, and models that tell more than they should."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rvmcv_worker import config, daemon
from rvmcv_worker.compute import telltale
from rvmcv_worker.config import (
    PINNED,
    ConfigError,
    ModelSettings,
    ServerSettings,
    Settings,
    TimingSettings,
    WorkerSettings,
    load_credentials,
)
from rvmcv_worker.controller import Controller
from rvmcv_worker.engine_wire import Trust
from rvmcv_worker.errors import ChecksumMismatchError, ModelInvalidError
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.jobs import inference_config, model_choice
from rvmcv_worker.jobs.inference_config import InferenceOptions
from rvmcv_worker.model_store import ModelStore
from rvmcv_worker.sandbox import MissingWall, PlainProcess
from rvmcv_worker.storage import Storage
from rvmcv_worker.token_source import TokenSource
from tests.file_server import FileServer, give, sha256_of

GENUINE = b"genuine weights" * 1000
FORGED = b"what somebody uploaded under that name" * 400
API = "/api/v1/cv/download-model"
SEGMENTER = "sam2.1_hiera_tiny"
PINS = ModelSettings(pinned={SEGMENTER: sha256_of(GENUINE), "yolo11n.pt": sha256_of(GENUINE)})
UNPINNED = ModelSettings(pinned={"yolo11n.pt": ""})


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def worker(server: FileServer, tmp_path: Path) -> Iterator[Callable[..., SimpleNamespace]]:
    """Makes what an attempt has of the daemon, with a store that has `pins`."""
    (tmp_path / "token").write_text("a-token")
    interrupt, opened = Interrupt(), []

    def make(pins: ModelSettings) -> SimpleNamespace:
        settings = Settings(
            server=ServerSettings(url=server.url),
            worker=WorkerSettings(credentials_dir=tmp_path, runtime_dir=tmp_path / "run"),
            models=pins,
            timing=TimingSettings(scale=0.001),
        )
        controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
        storage = Storage(settings, load_credentials(settings), controller)
        opened.extend((storage, controller))
        store = ModelStore(tmp_path / "models", 1 << 30, pins=pins)
        services = SimpleNamespace(settings=settings, storage=storage, model_store=store)
        return SimpleNamespace(services=services, interrupt=interrupt)

    yield make
    for each in (*opened, interrupt):
        each.close()


def fetch(attempt: SimpleNamespace, wanted: str, sha256: str | None = None) -> str:
    return attempt.services.model_store.fetch_base_model(
        wanted,
        expected_sha256=sha256,
        storage=attempt.services.storage,
        max_bytes=1 << 20,
        interrupt=attempt.interrupt,
    )


def choose(attempt: SimpleNamespace, **job: Any) -> model_choice.Chosen:
    wanted = inference_config.parse(InferenceOptions, {"model_version": "v3", "model_active": True, **job})
    return model_choice.choose(attempt, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["yolo11n.pt", "yolo11n", "YOLO11N.pt"])
def test_a_pinned_name_does_not_stand_for_what_somebody_uploaded(
    worker: Callable[..., SimpleNamespace], server: FileServer, tmp_path: Path, name: str
) -> None:
    server.on(f"{API}/{name}", give(FORGED, promise=sha256_of(FORGED)))

    told = rf"not {sha256_of(GENUINE)}.*\[models.pinned\].*a name of its own, or.*pin its sha256"
    with pytest.raises(ChecksumMismatchError, match=told):
        fetch(worker(PINS), name)
    assert list((tmp_path / "models").iterdir()) == []
    assert fetch(worker(UNPINNED), name) == sha256_of(FORGED), "the attack is none: this test shows nothing"


def test_a_pin_holds_for_what_the_store_knows_by_name(
    worker: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    (tmp_path / "n.pt").write_bytes(FORGED)
    attempt = worker(PINS)
    attempt.services.model_store.add(tmp_path / "n.pt", name="yolo11n.pt")

    with pytest.raises(ChecksumMismatchError, match="the worker's store has"):
        fetch(attempt, "yolo11n.pt")
    assert fetch(worker(UNPINNED), "yolo11n.pt") == sha256_of(FORGED)


def test_a_job_cannot_say_what_a_pinned_name_is(
    worker: Callable[..., SimpleNamespace], server: FileServer
) -> None:
    server.on(f"{API}/yolo11n.pt", give(FORGED, promise=sha256_of(FORGED)))

    with pytest.raises(ChecksumMismatchError, match="upload another model under a name of its own"):
        fetch(worker(PINS), "yolo11n.pt", sha256_of(FORGED))
    assert server.seen == []
    assert fetch(worker(UNPINNED), "yolo11n.pt", sha256_of(FORGED)) == sha256_of(FORGED)


def test_a_pinned_model_in_the_store_costs_no_request(
    worker: Callable[..., SimpleNamespace], server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "n.pt").write_bytes(GENUINE)
    attempt = worker(PINS)
    attempt.services.model_store.add(tmp_path / "n.pt")

    assert fetch(attempt, "yolo11n.pt") == sha256_of(GENUINE)
    assert server.seen == []


def test_a_model_asked_for_by_hash_is_that_hash(
    worker: Callable[..., SimpleNamespace], server: FileServer
) -> None:
    sha256 = sha256_of(GENUINE)
    server.on(f"{API}/{sha256}", give(FORGED, promise=sha256))

    with pytest.raises(ChecksumMismatchError, match=f"not {sha256}"):
        fetch(worker(UNPINNED), sha256)


@pytest.mark.parametrize(
    ("pins", "served", "active", "trust"),
    [
        (UNPINNED, FORGED, False, Trust.OTHER),  # for all the worker knows, a stranger's
        (UNPINNED, GENUINE, True, Trust.APPROVED),
        (PINS, GENUINE, False, Trust.APPROVED),
    ],
)
def test_the_name_of_metas_model_alone_makes_none_approved(
    worker: Callable[..., SimpleNamespace],
    server: FileServer,
    pins: ModelSettings,
    served: bytes,
    active: bool,
    trust: Trust,
) -> None:
    server.on(f"{API}/v3", give(b"detector", promise=sha256_of(b"detector")))
    server.on(f"{API}/{SEGMENTER}", give(served, promise=sha256_of(served)))

    chosen = choose(worker(pins), segmentation=True, segmenter=SEGMENTER, segmenter_active=active)
    assert (chosen.trust, chosen.segmenter_sha256) == (trust, sha256_of(served))


def test_a_forged_segmenter_comes_into_no_engine(
    worker: Callable[..., SimpleNamespace], server: FileServer
) -> None:
    server.on(f"{API}/v3", give(b"detector", promise=sha256_of(b"detector")))
    server.on(f"{API}/{SEGMENTER}", give(FORGED, promise=sha256_of(FORGED)))

    with pytest.raises(ChecksumMismatchError):
        choose(worker(PINS), segmentation=True, segmenter=SEGMENTER, segmenter_active=True)


def test_the_pin_of_one_model_takes_no_other_away(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[models.pinned]\n"{SEGMENTER}" = "{"ab" * 32}"\n')
    models = config.load(file).models
    assert models.sha256_of(f"{SEGMENTER}.pt") == "ab" * 32
    assert models.sha256_of("yolo11n.pt") == PINNED["yolo11n.pt"]
    assert models.sha256_of("yolo11s.pt") is None
    assert f'"{SEGMENTER}" = "{"ab" * 32}"' in "\n".join(config.show(config.load(file)))

    file.write_text(f'[models.pinned]\n"{SEGMENTER}" = "{"AB" * 32}"\n')
    assert config.load(file).models.sha256_of(SEGMENTER) == "ab" * 32
    file.write_text('[models.pinned]\nYOLO11n = ""\n')
    assert config.load(file).models.sha256_of("yolo11n.pt") is None
    file.write_text('[models.pinned]\n"yolo11n.pt" = "none"\n')
    with pytest.raises(ConfigError, match=r"models\.pinned\.yolo11n\.pt"):
        config.load(file)


def changed_unseen(path: Path, look: Callable[[], object]) -> None:
    """Change a file of the store after `look` has found it good, as a process of the same user may.

    A page that is mapped and dirty when the file is hashed can be written to without any time changing.
    """
    path.chmod(0o600)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        path.chmod(0o400)
        memory[0:1] = memory[0:1]
        look()
        before = path.stat()
        memory[: len(b"forged")] = b"forged"
        after = path.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


@pytest.mark.parametrize("walled", [True, False])
def test_without_a_wall_a_store_file_is_hashed_at_each_use(
    tmp_path: Path, logged: list[str], walled: bool
) -> None:
    (tmp_path / "n.pt").write_bytes(GENUINE)
    store = ModelStore(tmp_path / "models", 1 << 30, walled=walled)
    sha256 = store.add(tmp_path / "n.pt")
    changed_unseen(tmp_path / "models" / sha256, lambda: store.get(sha256))

    found = store.get(sha256)
    if walled:  # where no job reaches the file: the attack works without the defence
        assert found is not None
        assert sha256_of(found.read_bytes()) != sha256
    else:
        assert found is None
        assert not (tmp_path / "models" / sha256).exists()
        assert any("removed, it will be fetched again" in line for line in logged)


def test_what_changed_in_the_store_is_fetched_again(
    worker: Callable[..., SimpleNamespace], server: FileServer, tmp_path: Path
) -> None:
    server.on(f"{API}/yolo11n.pt", give(GENUINE))
    attempt = worker(PINS)
    sha256 = fetch(attempt, "yolo11n.pt")
    path = tmp_path / "models" / sha256
    path.chmod(0o600)
    path.write_bytes(FORGED)

    assert fetch(attempt, "yolo11n.pt") == sha256
    assert path.read_bytes() == GENUINE
    assert len(server.seen) == 2


@pytest.mark.parametrize(("wall", "walled"), [(PlainProcess, False), (MissingWall, True)])
def test_the_daemon_tells_the_store_whether_there_is_a_wall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wall: type, walled: bool
) -> None:
    (tmp_path / "token").write_text("a-token")
    settings = Settings(worker=WorkerSettings(state_dir=tmp_path / "state", credentials_dir=tmp_path))
    settings.worker.state_dir.mkdir()
    monkeypatch.setattr(daemon.sandbox, "choose", lambda *_, **__: wall())
    services = daemon.make_services(settings)
    try:
        assert services.model_store._walled is walled
        assert services.model_store._pins == settings.models
    finally:
        services.spawner.close()
        services.ledger.close()
        services.controller.close()
        services.storage.close()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("https://me:pw@minio:9000/models", "a URL with a user or password"),
        ("s3/best.pt?X-Amz-Signature=0f1e", "a presigned URL"),
        ("https://host/best.pt?sig=0f1e", "a presigned URL"),
        ("Authorization: Bearer 12|abcdefgh", "a bearer token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("AKIAIOSFODNN7EXAMPLE", "an access key"),
        ("s3_secret_key = x", "a password or key"),
        ("anna@vm102", "the address of a person or host"),
        ("git@github.com:anna/x.git", "the address of a person or host"),
    ],
)
def test_secrets_in_a_model_are_seen_and_not_repeated(text: str, kind: str) -> None:
    with pytest.raises(ModelInvalidError, match=kind) as refusal:
        telltale.refuse_secrets("best.pt", {"epochs", text}, ())
    assert text not in refusal.value.message
    telltale.refuse_secrets("best.pt", {"epochs", text}, [text])  # a class of the data set's


@pytest.mark.parametrize(
    "text",
    [
        "sam_mask_decoder.iou_token.weight",
        "metrics/mAP50-95(B)",
        "AGPL-3.0 (https://ultralytics.com/license)",
        "https://docs.ultralytics.com",
        "mAP@0.5",
        "2.15.0+cu132",
        *(word * 200_000 for word in ("x", "token", "secret-", "Bearer ", "a.b+")),  # and takes no minutes
    ],
)
def test_what_a_model_may_say_is_no_secret(text: str) -> None:
    telltale.refuse_secrets("best.pt", {text}, ())


def test_the_names_of_machine_and_user_are_found_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "canary-user")
    monkeypatch.setenv("LOGNAME", "ab")
    assert "canary-user" in telltale.machine_words()
    assert not {"ab", "root"} & set(telltale.machine_words())
    monkeypatch.setenv("LOGNAME", "job")  # as behind the wall, in every message of ours too
    assert "job" not in telltale.machine_words()
    for metadata in ({"by": "canary-user"}, {"a": [("x", {"b": "runs of canary-user, 2026"})]}):
        with pytest.raises(ModelInvalidError, match="names the machine or the user"):
            telltale.refuse_place("best.pt", metadata, ())
    telltale.refuse_place("best.pt", {"by": "canary-users", "canary-user": 1}, ())
    telltale.refuse_place("best.pt", {"names": {0: "canary-user"}}, ["canary-user"])


#: Makes a good model as a training of ours does, and others that say more; has each checked.
_CHECK_YOLO11 = """
import json, os, sys
from pathlib import Path
import torch
from rvmcv_worker.compute import ultralytics_env
from rvmcv_worker.errors import JobError
root = Path(sys.argv[1])
named = os.uname()[2:]
def call_this_machine(name):
    os.uname = lambda: os.uname_result(("Linux", name, *named))
call_this_machine("vm-canary.example")
ultralytics_env.isolate(root / "check")
ultralytics_env.isolate = lambda directory: None
from ultralytics import YOLO
from ultralytics.nn.tasks import torch_safe_load
from rvmcv_worker.compute import check_model, checkpoint, safe_weights
from rvmcv_worker.compute.child import Child

child = Child(root, root / "check", progress_fd=-1)
yolo = YOLO("yolo11n.yaml")
raw = {"model": yolo.model, "train_args": {"model": "/home/anna/yolo11n.pt"}, "git": {"branch": "x"}}
torch.save(raw, root / "raw.pt")
args = checkpoint.neutral({"model": "/home/anna/yolo11n.pt", "data": "/srv/data.yaml", "optimizer": "AdamW"})
checkpoint.clean(root / "raw.pt", root / "good.pt", args)
good = checkpoint.weights(root / "good.pt")
safe_weights.write(root / "good.safetensors", good)

def variant(name, change):
    content, _ = torch_safe_load(str(root / "good.pt"))
    change(content)
    torch.save(content, root / f"{name}.pt")
    return f"{name}.pt"

class Attack:
    def __reduce__(self):
        return (os.mkdir, (str(root / "marker"),))

answers = {}
def check(label, model, safe=None, **more):
    try:
        job = {"model": model, "label_task": "detect", "safetensors": safe, **more}
        answers[label] = check_model.run(job, child)["ok_types"]
    except JobError as error:
        answers[label] = error.to_wire()

check("good", "good.pt", "good.safetensors")
for name in ("docs", "ultralytics", "AGPL", "yolo11n", "data", "Conv", "nn", "nearest", "detect"):
    call_this_machine(name)
    check(f"on {name}", "good.pt")
call_this_machine("vm-canary.example")
check("as Ultralytics writes it", "raw.pt")
check("git", variant("git", lambda content: content.update(git={"branch": "x"})))
check("an argument", variant("argument", lambda content: content["train_args"].update(host="x")))
check("host", variant("host", lambda content: content["train_args"].update(data="vm-canary.yaml")))
check("user", variant("user", lambda content: setattr(content["model"], "by", ["canary-user"])))
check("secret", variant("secret", lambda content: content.update(version="Bearer canary|0123456789")))
check("code", variant("code", lambda content: content.update(version=Attack())))
named_like_a_key = "hf_bottles_and_cans_of_2026.pt"
odd = variant("odd", lambda content: content["train_args"].update(model=named_like_a_key))
check("from a model named like a key", odd, base_model=named_like_a_key)
check("a key", odd)
marker = root / "marker"
answers["marker after the check"] = marker.exists()
torch.load(root / "code.pt", weights_only=False)
answers["marker after plain torch.load"] = marker.exists()

first = next(iter(good))
tensors = {
    "other weights": {**good, first: good[first] + 1},
    "a bit": {**good, first: (good[first].view(torch.int16) ^ 1).view(good[first].dtype)},
    "another type": {name: tensor.float() for name, tensor in good.items()},
    "one less": dict(list(good.items())[1:]),
}
for label, changed in tensors.items():
    safe_weights.write(root / "x.safetensors", changed)
    check(label, "good.pt", "x.safetensors")
content = (root / "good.safetensors").read_bytes()
size = int.from_bytes(content[:8], "little")
header = json.loads(content[8:8 + size])
header["__metadata__"]["by"] = "anna"
text = json.dumps(header).encode()
files = {
    "metadata": len(text).to_bytes(8, "little") + text + content[8 + size:],
    "something after it": content + b"canary",
    "cut off": content[:-1],
    "a pickle": (root / "good.pt").read_bytes(),
}
for label, changed in files.items():
    (root / "x.safetensors").write_bytes(changed)
    check(label, "good.pt", "x.safetensors")
from safetensors.torch import load
(root / "x.safetensors").write_bytes(files["metadata"])
answers["metadata is read by others"] = len(load(files["metadata"])) == len(good)
(root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("checked")
    (root / "check").mkdir()
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "USER": "canary-user"}
    command = [sys.executable, "-c", _CHECK_YOLO11, str(root)]
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return dict(json.loads((root / "answers.json").read_text()))


@pytest.mark.slow
def test_a_model_made_as_ours_passes_with_its_safetensors(checked: dict[str, Any]) -> None:
    assert checked["good"] is True
    assert checked["from a model named like a key"] is True
    on_machines = {label: answer for label, answer in checked.items() if label.startswith("on ")}
    assert on_machines == dict.fromkeys(on_machines, True)
    assert on_machines
    assert checked["metadata is read by others"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("as Ultralytics writes it", "paths of the machine it was made on: '/home/anna/yolo11n.pt'"),
        ("git", "has 'git': no training of ours writes that"),
        ("an argument", "has 'host': no training of ours writes that"),
        ("host", "names the machine or the user"),
        ("user", "names the machine or the user"),
        ("secret", "holds a bearer token"),
        ("a key", "holds an access key"),
        ("code", "would run code when opened"),
        *(
            (what, "is not best.pt's weights in another format")
            for what in (
                *("other weights", "a bit", "another type", "one less"),
                *("metadata", "something after it", "cut off", "a pickle"),
            )
        ),
    ],
)
def test_a_model_that_says_more_is_not_published(checked: dict[str, Any], what: str, told: str) -> None:
    assert checked[what]["code"] == "model_invalid"
    assert told in checked[what]["message"]
    assert "canary" not in checked[what]["message"]


@pytest.mark.slow
def test_the_check_runs_nothing_of_what_plain_torch_runs(checked: dict[str, Any]) -> None:
    assert checked["marker after the check"] is False
    assert checked["marker after plain torch.load"] is True, "the attack is none: this test shows nothing"
