"""Real fine-tunings of SAM2 on the CPU: hiera-tiny from random weights, on drawn pictures of 96 px."""

from __future__ import annotations

import csv
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import cv2
import pytest
import torch
from sam2.build_sam import build_sam2

from rvmcv_worker.compute import (
    check_model,
    sam2_checkpoint,
    sam2_curves,
    sam2_delivery,
    sam2_optimizer,
    sam2_sheet,
)
from rvmcv_worker.compute.sam2_base_model import BaseModel
from rvmcv_worker.compute.sam2_network import Network
from tests import sam2_files
from tests.compute_child import ComputeChild
from tests.file_limit import file_limit
from tests.sam2_jobs import NAMES, OPTIONS, draw_prepared, train_here, train_sam2

pytestmark = pytest.mark.slow

EPOCHS = {"epochs": 3}


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ComputeChild]]:
    """The same training three times at once: to its end, told to stop, and killed."""
    started: dict[str, ComputeChild] = {}
    for name in ("whole", "stopped", "killed"):
        root = tmp_path_factory.mktemp("canary-workspace")
        draw_prepared(root, {"train": 4, "val": 2, "test": 1})
        (root / "in").mkdir()
        (root / "in" / "active.pt").write_bytes(b"no checkpoint")
        started[name] = train_sam2(root, options=EPOCHS, active_model="in/active.pt")
    threads = [
        threading.Thread(target=_end_after_first_epoch, args=(started[name], number))
        for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL))
    ]
    for thread in threads:
        thread.start()
    yield started
    for thread in threads:
        thread.join()
    for child in started.values():
        if child.process.poll() is None:
            child.process.kill()


def _end_after_first_epoch(child: ComputeChild, number: int) -> None:
    for message in child.messages():
        if message.get("checkpoint", {}).get("epoch") == 1:
            child.process.send_signal(number)


@pytest.fixture(scope="module")
def whole(children: dict[str, ComputeChild]) -> ComputeChild:
    answer = children["whole"].finish()
    assert answer["ok"], answer
    return children["whole"]


def result_of(child: ComputeChild) -> dict[str, Any]:
    return dict(child.result()["result"])


def history_of(child: ComputeChild) -> list[dict[str, Any]]:
    return [entry for message in child.received for entry in message.get("history", [])]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in ("epoch", "epochs", "losses", "metrics", "lr")} for entry in history]


def test_each_epoch_is_told_once_and_beside_the_base_and_the_box(whole: ComputeChild) -> None:
    history = history_of(whole)

    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert set(entry["losses"]) == {"total", "mask", "dice", "iou", "object"}
        measured = {"miou", "miou_click", "boundary_f"}
        assert set(entry["metrics"]) == {
            *measured,
            *(f"base/{name}" for name in measured),
            "box_as_mask/miou",
            "box_as_mask/boundary_f",
        }
        assert entry["metrics"]["base/miou"] == history[0]["metrics"]["base/miou"]
        assert 0 < entry["lr"] <= 1e-3
        assert entry["epoch_s"] > 0
    assert history[-1]["eta_s"] == 0
    assert history[-1]["lr"] == pytest.approx(1e-4)


def test_progress_rises_and_says_what_is_done(whole: ComputeChild) -> None:
    told = [message for message in whole.received if "checkpoint" not in message]
    fractions = [message["fraction"] for message in told]
    messages = [message.get("message", "") for message in told]

    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    phases = [message["phase"] for message in told]
    assert phases == sorted(phases, key=["train", "evaluate"].index)
    for said in ("encoding the images of val", "measuring the base model", "encoding the images of train"):
        assert any(said in message for message in messages), said
    assert [message["checkpoint"]["epoch"] for message in whole.received if "checkpoint" in message][-1] == 3


def test_the_result_says_what_it_is_worth_and_what_was_in_force(whole: ComputeChild) -> None:
    result, history = result_of(whole), history_of(whole)
    metrics, effective = result["metrics"], result["effective"]

    best = max(history, key=lambda entry: entry["metrics"]["miou"])
    assert (result["epochs"], result["ended_by"]) == (3, "epochs")
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["miou"] == metrics["fitness"] == best["metrics"]["miou"]
    assert metrics["base"]["miou"] == best["metrics"]["base/miou"]
    assert metrics["box_as_mask"]["miou_click"] is None
    assert metrics["improved"] is (metrics["miou"] - metrics["base"]["miou"] >= 0.001)
    assert metrics["verdict"].startswith("better" if metrics["improved"] else "NOT better")
    assert list(metrics["per_class"]) == NAMES
    assert metrics["test"]["instances"] == metrics["test"]["base"]["instances"] == 2
    assert "active.pt" in metrics["active"]["error"]
    assert {**OPTIONS, **EPOCHS, "lr0": 1e-3, "lrf": 0.1, "cache": "auto"}.items() <= effective.items()
    assert effective["architecture"] == "sam2.1_hiera_tiny"
    assert (effective["device"], effective["precision"]) == ("cpu", "fp32")
    assert 0 < effective["parameters_trained"] < effective["parameters"] / 4
    assert effective["caches"]["train"]["kept"] == effective["caches"]["train"]["wanted"] > 4
    assert effective["images_at_once"] >= 1
    assert effective["objects_at_once"] >= 1
    assert result["versions"]["sam2"]
    assert result["attempts"] == [{"attempt": 1, "epochs": 3, "batch_size": 2, "img_size": 64}]


def test_best_pt_is_what_sam2_loads_and_what_the_worker_serves(whole: ComputeChild) -> None:
    best = whole.directory / "best.pt"
    built = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", str(best), device="cpu").state_dict()
    model, checkpoint = sam2_checkpoint.open_sam2(best)

    opened = model.state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in built.items())
    assert checkpoint.metadata["image_px"] == 64
    assert checkpoint.metadata["classes"] == NAMES
    assert checkpoint.metadata["epochs"] == result_of(whole)["metrics"]["best_epoch"]


def test_only_the_decoder_has_changed(whole: ComputeChild) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(OPTIONS["seed"])
        base = sam2_checkpoint.build("sam2.1_hiera_tiny").state_dict()
    trained = sam2_checkpoint.read(whole.directory / "best.pt").weights

    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {"sam_mask_decoder", "sam_prompt_encoder"}


def test_nothing_published_tells_where_it_was_made(whole: ComputeChild) -> None:
    files = result_of(whole)["files"]
    traces = [b"canary", str(Path.home()).encode() + b"/", b"site-packages"]
    if len(socket.gethostname()) > 5:
        traces.append(socket.gethostname().encode())

    assert files == ["best.pt", "results.csv", "args.yaml", "curves.png", "masks.jpg"]
    for name in files:
        content = (whole.directory / name).read_bytes()
        assert content, name
        assert not [trace for trace in traces if trace in content], name
    assert "epochs: 3\n" in (whole.directory / "args.yaml").read_text()
    assert [int(row["epoch"]) for row in rows(whole.directory / "results.csv")] == [1, 2, 3]
    for name in ("curves.png", "masks.jpg"):
        assert cv2.imread(str(whole.directory / name)) is not None


def test_it_reaches_for_no_network(whole: ComputeChild) -> None:
    watched = whole.watched_file.read_text().splitlines()
    # ctypes and matplotlib ask these two where libraries and fonts are.
    local = ("subprocess.Popen ('fc-list'", "subprocess.Popen ('/sbin/ldconfig'")

    assert [line for line in watched if not line.startswith(local)] == []


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_training_that_goes_on_is_to_the_bit_one_in_a_piece(
    end: str, children: dict[str, ComputeChild], whole: ComputeChild
) -> None:
    child = children[end]
    child.process.wait(60)
    if end == "stopped":
        assert child.result() == {"ok": False, "stopped": True}
    else:
        assert child.process.returncode == -signal.SIGKILL
    root = child.directory.parent
    newest = max(child.directory.glob("checkpoint-*.tar"))
    newest.rename(root / "in" / "checkpoint.tar")
    again = train_here(
        root,
        "again",
        options=EPOCHS,
        attempt=2,
        resume="in/checkpoint.tar",
        active_model="in/active.pt",
    )

    assert again.result["metrics"] == result_of(whole)["metrics"]
    assert (again.directory / "best.pt").read_bytes() == (whole.directory / "best.pt").read_bytes()
    assert without_times(again.history) == without_times(history_of(whole))
    assert [run["epochs"] for run in again.result["attempts"]] in ([1, 2], [2, 1])
    assert [int(row["epoch"]) for row in rows(again.directory / "results.csv")] == [1, 2, 3]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw_prepared(tmp_path, {"train": 4, "val": 2})
    return tmp_path


def test_a_time_limit_cuts_an_epoch_and_what_is_over_is_only_measured(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train_here(root, time_limit_h=1e-9, options={"epochs": 50})

    assert (first.result["ended_by"], first.result["epochs"]) == ("time_limit", 1)
    assert first.history[0]["metrics"]["miou"] == first.result["metrics"]["miou"]
    assert first.history[0]["lr"] == pytest.approx(5e-4)  # the first step of two, in the warm-up

    (file,) = first.directory.glob("checkpoint-*.tar")
    file.rename(root / "checkpoint.tar")
    resume: dict[str, Any] = {"resume": "checkpoint.tar", "attempt": 2, "time_limit_h": 1e-9}
    again = train_here(root, options={"epochs": 50}, **resume)
    for key in ("metrics", "epochs", "ended_by", "attempts", "files"):
        assert again.result[key] == first.result[key], key
    assert "encoding the images of train" not in str(again.received)

    capsys.readouterr()
    other = train_here(root, options={"epochs": 50, "seed": 6}, **resume)
    assert [run["attempt"] for run in other.result["attempts"]] == [2]
    assert "the training starts from the beginning: it is of another base model" in capsys.readouterr().out


def test_a_training_that_gains_nothing_ends_by_patience_and_says_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = train_here(root, options={"epochs": 50, "patience": 1, "lr0": 1e-12, "fliplr": 0.0})
    metrics = child.result["metrics"]

    assert (child.result["ended_by"], child.result["epochs"]) == ("patience", 2)
    assert metrics["best_epoch"] == 1
    assert metrics["improved"] is False
    assert metrics["verdict"].startswith("NOT better than the base model")
    assert metrics["verdict"] in [message.get("message") for message in child.received]
    assert metrics["verdict"] in capsys.readouterr().out
    assert (child.directory / "best.pt").is_file()


@pytest.mark.parametrize(
    "at", ["encoding the images of val", "measuring the base", "encoding the images of train"]
)
def test_a_stop_ends_it_before_the_first_step(at: str, root: Path) -> None:
    child = train_here(root, stop_at=at)

    assert child.answer == {"ok": False, "stopped": True}
    assert child.history == []
    assert at in child.received[-1]["message"]


@pytest.mark.parametrize("where", ["training", "measuring"])
def test_where_the_gpus_memory_runs_out_it_goes_on_with_fewer_objects(
    where: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Network.decode

    def short(network: Network, features: Any, image_of: Any, *args: Any, **kwargs: Any) -> Any:
        if len(image_of) > 1 and network.model.training is (where == "training"):
            run_out()
        return decode(network, features, image_of, *args, **kwargs)

    monkeypatch.setattr(Network, "decode", short)
    child = train_here(root, options={"epochs": 1, "box_share": 1.0})

    assert child.result["effective"]["objects_at_once"] == 1
    told = [m["message"] for m in child.received if "memory ran out" in m.get("message", "")]
    assert ["1 object and" in message for message in told] == [False, True]
    assert [entry["epoch"] for entry in child.history] == [1]


@pytest.mark.parametrize("method", ["frozen", "decode"])
def test_what_does_not_fit_at_all_is_told_with_how_small_it_was(
    method: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, method, lambda *_args, **_options: run_out())
    answer = train_here(root).answer

    assert answer["error"]["code"] == "out_of_gpu_memory"
    assert answer["detail"]["batch"] == 1
    assert (answer["detail"]["epochs"], answer["detail"]["files"]) == (0, [])


def run_out() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (a test)")


def test_a_full_disk_is_told_and_what_was_measured_is_there(root: Path) -> None:
    with file_limit(1_000_000):  # less than an epoch's parameters
        answer = train_here(root).answer

    assert answer["error"]["code"] == "disk_quota"
    assert (answer["detail"]["epochs"], answer["detail"]["files"]) == (1, ["results.csv", "curves.png"])
    assert list((root / "train" / "run").iterdir()) == []


def test_no_training_is_lost_over_its_pictures(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def torn(*_args: Any, **_options: Any) -> NoReturn:
        raise ValueError("a torn canvas")

    monkeypatch.setattr(sam2_sheet, "draw", torn)
    monkeypatch.setattr(sam2_curves, "_draw", torn)
    child = train_here(root, options={"epochs": 1})

    assert child.result["files"] == ["best.pt", "results.csv", "args.yaml"]
    assert capsys.readouterr().err.count("ValueError: a torn canvas") == 2
    job = {"model": "train/best.pt", "model_type": "sam2", "expect": {"names": NAMES}}
    assert check_model.run(job, child)["ok_types"]


def test_no_training_is_lost_over_what_is_measured_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_prepared(tmp_path, {"train": 2, "val": 1, "test": 1})
    serve, calls = BaseModel.serve, []

    def fails_on_test(base: BaseModel, network: Network) -> None:
        calls.append(base)
        if len(calls) > 1:  # the first is before the training
            raise ValueError("/srv/base of anna@vm: torn, token: x")  # a model with this is not published
        serve(base, network)

    monkeypatch.setattr(BaseModel, "serve", fails_on_test)
    monkeypatch.setattr(sam2_delivery.yaml, "safe_dump", lambda *_args, **_options: 1 / 0)
    child = train_here(tmp_path, options={"epochs": 1})

    error = "ValueError in the training: /srv/base of anna@vm: torn, token: x"
    assert child.result["metrics"]["test"] == {"error": error}
    assert child.result["files"] == ["best.pt", "results.csv", "curves.png", "masks.jpg"]
    job = {"model": "train/best.pt", "model_type": "sam2", "expect": {"names": NAMES}}
    assert check_model.run(job, child)["ok_types"]
    delivered = sam2_checkpoint.read(child.directory / "best.pt").weights
    trained = torch.load(child.directory / "run" / "best.pt", weights_only=True)["trained"]
    assert all(torch.equal(delivered[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("batch", [4, 2])  # found by what is measured after a step, and by the next step
def test_a_training_that_diverges_is_the_jobs_fault(
    batch: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam2_optimizer, "learning_rate", lambda *_args: 1e30)
    answer = train_here(root, options={"batch": batch}).answer

    assert answer["error"]["code"] == "invalid_job"
    assert "lr0" in answer["error"]["message"]


def test_an_image_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "prepare" / "data" / "images" / "train" / "002.png").write_bytes(b"no image")
    answer = train_here(root).answer

    assert answer["error"]["code"] == "dataset_invalid"
    assert "images/train/002.png" in answer["error"]["message"]


def test_a_split_of_which_nothing_is_left_is_the_data_sets_fault(root: Path) -> None:
    (root / "prepare" / "data" / "instances" / "val.jsonl").write_text("")
    answer = train_here(root).answer

    assert answer["error"]["code"] == "dataset_invalid"
    assert "val" in answer["error"]["message"]


def test_a_base_model_of_another_kind_is_refused(root: Path) -> None:
    (root / "base.pt").write_bytes(b"no checkpoint")

    assert train_here(root, model="base.pt").answer["error"]["code"] == "model_invalid"
    assert train_here(root, architecture="sam3").answer["error"]["code"] == "model_invalid"


def test_a_base_model_whose_masks_are_no_numbers_is_refused(root: Path) -> None:
    weights = sam2_files.weights().items()
    huge = {key: 1e20 * each if "hypernetworks" in key else each for key, each in weights}
    sam2_files.save(root / "base.pt", {"model": huge})
    error = train_here(root, model="base.pt").answer["error"]

    assert error["code"] == "model_invalid"
    assert "no finite numbers" in error["message"]


def test_a_base_model_from_a_file_is_named_in_what_comes_of_it(root: Path) -> None:
    sam2_files.save(root / "base.pt", image_px=96)
    child = train_here(
        root,
        model="base.pt",
        model_name="bottles_v1",
        active_model="base.pt",
        options={"epochs": 1, "cache": "off", "train": "decoder+neck"},
    )
    metadata = sam2_checkpoint.read(child.directory / "best.pt").metadata

    assert metadata["base_model"] == child.result["effective"]["model"] == "bottles_v1"
    assert len(metadata["base_sha256"]) == 64
    assert metadata["trained"] == "decoder+neck"
    assert child.result["effective"]["lr0"] == 5e-5
    assert child.result["effective"]["caches"]["train"]["mode"] == "off"
    assert child.result["metrics"]["active"]["instances"] == 4
