"""The encoder's output kept or not: always the same batches; how much is kept, where, and for how long."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rvmcv_worker.compute import sam2_checkpoint
from rvmcv_worker.compute.child import StopRequestedError
from rvmcv_worker.compute.sam2_batches import batches, wanted_in_training, wanted_upright
from rvmcv_worker.compute.sam2_embeddings import Embeddings, Key
from rvmcv_worker.compute.sam2_memory import Memory
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_samples import UPRIGHT, Batch, Flip, Samples
from rvmcv_worker.errors import DatasetInvalidError, ModelInvalidError
from rvmcv_worker.sam2_options import Sam2Options, Trained
from tests import sam2_pictures
from tests.file_limit import file_limit

PX = 64
CPU = torch.device("cpu")
#: Of one image at 64 px: 2 * (256 * 4 * 4 + 32 * 16 * 16 + 64 * 8 * 8).
ENTRY_BYTES = 32_768
PLENTY_BYTES = 1 << 30
MIRRORED = Flip(horizontal=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At 64 px several threads wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Seven images with one to five objects."""
    data = tmp_path_factory.mktemp("data")
    return Samples(data, sam2_pictures.split(data, [1, 2, 5, 1, 3, 1, 4]), PX)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX), "decoder", CPU)


def _options(**changed: Any) -> Sam2Options:
    return Sam2Options(**{"imgsz": PX, "batch": 3, "objects": 3, "epochs": 8, "seed": 5, **changed})


@pytest.fixture
def open_embeddings(
    samples: Samples, network: Network, tmp_path: Path
) -> Iterator[Callable[..., Embeddings]]:
    with contextlib.ExitStack() as opened:

        def open_some(
            options: Sam2Options,
            limit_bytes: int = PLENTY_BYTES,
            wanted: list[Key] | None = None,
            **other: Any,
        ) -> Embeddings:
            if wanted is None:
                wanted = wanted_in_training(samples, options, range(1, options.epochs + 1))
            network_ = other.pop("network", network)
            memory = Memory(options, CPU, lambda _: None)
            where = {"path": tmp_path / "embeddings.f16", "limit_bytes": limit_bytes, **other}
            return opened.enter_context(Embeddings(samples, network_, memory, options, wanted, **where))

        yield open_some


def _ignore(*_: object) -> None:
    """Hear a tick."""


def _held_bytes() -> int:
    held = psutil.Process().memory_info()
    return held.rss - held.shared


class Encoded:
    """The images that a network has encoded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


@pytest.fixture
def encoded(network: Network) -> Iterator[Encoded]:
    encoded = Encoded()
    hook = network.model.image_encoder.trunk.register_forward_hook(encoded)
    yield encoded
    hook.remove()


def _all(samples: Samples, embeddings: Embeddings, options: Sam2Options, **how: Any) -> list[Batch]:
    return [
        batch
        for epoch in range(1, options.epochs + 1)
        for batch in batches(samples, embeddings, options, epoch, **how)
    ]


def _assert_equal(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.frozen, other.frozen, strict=True))
        assert torch.equal(one.masks, other.masks)
        assert torch.equal(one.image_of, other.image_of)


@pytest.mark.parametrize("train", ["decoder", "decoder+neck"])
def test_keeping_changes_nothing_but_the_time(
    samples: Samples,
    train: Trained,
    open_embeddings: Callable[..., Embeddings],
    encoded: Encoded,
    network: Network,
) -> None:
    options = _options(train=train, epochs=2, cache="off")
    network = Network(network.model, train, CPU)
    without = open_embeddings(options, network=network)
    without.fill(_ignore)
    expected = _all(samples, without, options)
    each_time = encoded.count
    assert (without.mode, each_time) == ("off", 2 * len(samples))

    wanted = len(wanted_in_training(samples, options, range(1, 3)))
    entry_bytes = sum(part[0].numel() * 2 for part in expected[0].frozen)
    for mode, room, how in (
        ("ram", wanted, {}),
        ("disk", wanted, {}),
        ("disk", 4, {}),
        ("disk", 0, {}),
        ("disk", 4, {"threads": 1}),
    ):
        kept = open_embeddings(
            _options(train=train, cache=mode),
            room * entry_bytes,
            network=network,
            wanted=wanted_in_training(samples, options, range(1, 3)),
        )
        kept.fill(_ignore)
        assert (kept.mode, kept.describe()["kept"]) == (mode, room)
        encoded.count = 0
        _assert_equal(_all(samples, kept, options, **how), expected)
        if room == wanted:
            assert encoded.count == 0
        if room == 0:
            assert encoded.count == each_time
        kept.close()


def test_all_trained_keeps_nothing_and_gives_squares(
    samples: Samples, open_embeddings: Callable[..., Embeddings], network: Network
) -> None:
    options = _options(train="all")
    embeddings = open_embeddings(options, network=Network(network.model, "all", CPU))
    embeddings.fill(_ignore)
    assert embeddings.describe() == {"mode": "off", "kept": 0, "wanted": 14, "bytes": 0}
    (squares,) = embeddings.batch([(0, UPRIGHT), (3, MIRRORED)])
    assert torch.equal(squares, torch.stack([samples.square(0), samples.square(3, MIRRORED)]))


def test_a_mirrored_image_is_encoded_mirrored(
    open_embeddings: Callable[..., Embeddings], samples: Samples
) -> None:
    """The encoder's output is not mirrored by mirroring its input."""
    embeddings = open_embeddings(_options(cache="disk"))
    embeddings.fill(_ignore)
    upright, mirrored = embeddings.get(0, UPRIGHT), embeddings.get(0, MIRRORED)
    alone = embeddings.network.frozen(samples.square(0, MIRRORED)[None])
    for each, other, straight in zip(mirrored, alone, upright, strict=True):
        assert torch.equal(each, other[0])
        assert not torch.allclose(each, straight.flip(-1), atol=1e-2)


def test_what_is_asked_for_most_often_is_kept_first(samples: Samples) -> None:
    options = _options(fliplr=0.2, epochs=40)
    wanted = wanted_in_training(samples, options, range(1, 41))
    assert set(wanted[:7]) == {(index, UPRIGHT) for index in range(7)}
    assert set(wanted[7:]) == {(index, MIRRORED) for index in range(7)}
    assert wanted_upright(samples) == [(index, UPRIGHT) for index in range(7)]


@pytest.mark.parametrize(("fliplr", "flipud", "variants"), [(0, 0, 1), (1, 0, 1), (0.5, 0, 2), (0.5, 0.5, 4)])
def test_only_variants_that_occur_are_wanted(
    samples: Samples, fliplr: float, flipud: float, variants: int
) -> None:
    options = _options(fliplr=fliplr, flipud=flipud)
    wanted = wanted_in_training(samples, options, range(1, 64))
    assert len(wanted) == len(set(wanted)) == variants * len(samples)


def test_filling_tells_how_far_it_is(open_embeddings: Callable[..., Embeddings], encoded: Encoded) -> None:
    embeddings = open_embeddings(_options(cache="disk"))
    told: list[tuple[int, int, float]] = []
    embeddings.fill(lambda *progress: told.append(progress))
    assert [(done, whole) for done, whole, _ in told] == [(done, 14) for done in range(1, 15)]
    assert all(eta_s > 0 for *_, eta_s in told[:-1])
    assert told[-1][2] == 0
    assert encoded.count == 14
    embeddings.fill(_ignore)
    assert encoded.count == 14
    assert embeddings.describe() == {"mode": "disk", "kept": 14, "wanted": 14, "bytes": 14 * ENTRY_BYTES}
    assert embeddings.sentence() == "all 14 encoded images of train are kept on disk (0.459 MB)"


def test_a_stop_ends_the_filling_within_an_image(
    open_embeddings: Callable[..., Embeddings], encoded: Encoded, tmp_path: Path
) -> None:
    asked = itertools.count()

    def stop_at_the_fourth() -> None:
        if next(asked) == 3:
            raise StopRequestedError

    embeddings = open_embeddings(_options(cache="disk"), check_stop=stop_at_the_fourth)
    with pytest.raises(StopRequestedError):
        embeddings.fill(_ignore)
    assert encoded.count == 3
    embeddings.close()
    assert not (tmp_path / "embeddings.f16").exists()


def test_a_full_disk_ends_the_filling_and_not_the_training(
    samples: Samples, open_embeddings: Callable[..., Embeddings], tmp_path: Path
) -> None:
    options = _options(cache="disk", epochs=2)
    embeddings = open_embeddings(options, wanted=wanted_in_training(samples, options, range(1, 9)))
    with file_limit(5 * ENTRY_BYTES + 100):
        embeddings.fill(_ignore)
    # Half of the five that there is room for: a checkpoint needs some too.
    assert embeddings.describe()["kept"] == 2
    assert (tmp_path / "embeddings.f16").stat().st_size == 2 * ENTRY_BYTES
    assert "2 of 14 encoded images of train are kept on disk" in embeddings.sentence()
    assert "the disk is full" in embeddings.sentence()
    _assert_equal(
        _all(samples, embeddings, options), _all(samples, open_embeddings(_options(cache="off")), options)
    )


def test_a_disk_that_takes_nothing_is_no_fault_either(
    samples: Samples, open_embeddings: Callable[..., Embeddings]
) -> None:
    options = _options(cache="disk")
    embeddings = open_embeddings(options)
    with file_limit(100):
        embeddings.fill(_ignore)
    assert embeddings.describe()["kept"] == 0
    assert embeddings.sentence() == (
        "every image of train is encoded each time: there is no room to keep any on disk"
    )
    assert len(list(batches(samples, embeddings, options, 1))) == 3


@pytest.mark.parametrize(
    ("memory_bytes", "mode"),
    [(14 * ENTRY_BYTES * 11, "ram"), (14 * ENTRY_BYTES * 9, "disk"), (0, "disk")],
)
def test_auto_takes_memory_when_it_is_little_of_what_the_job_has_left(
    open_embeddings: Callable[..., Embeddings], memory_bytes: int, mode: str
) -> None:
    limit_bytes = _held_bytes() + memory_bytes
    assert open_embeddings(_options(), memory_limit_bytes=limit_bytes).mode == mode


def test_ram_takes_half_of_what_the_job_has_left(open_embeddings: Callable[..., Embeddings]) -> None:
    limit_bytes = _held_bytes() + 15 * ENTRY_BYTES
    embeddings = open_embeddings(_options(cache="ram"), memory_limit_bytes=limit_bytes)
    embeddings.fill(_ignore)
    assert 1 <= embeddings.describe()["kept"] <= 7
    assert "more does not fit" in embeddings.sentence()


def test_output_beyond_half_precision_is_clamped_and_told(
    open_embeddings: Callable[..., Embeddings], samples: Samples
) -> None:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX)
    model.no_mem_embed.data.fill_(1e6)
    embeddings = open_embeddings(_options(cache="disk"), network=Network(model, "decoder", CPU))
    embeddings.fill(_ignore)
    assert embeddings.describe()["clamped"] == 14
    assert float(embeddings.get(0, UPRIGHT)[0].max()) == torch.finfo(torch.float16).max


def test_output_that_is_no_number_is_refused(open_embeddings: Callable[..., Embeddings]) -> None:
    model = sam2_checkpoint.build("sam2.1_hiera_tiny", image_px=PX)
    model.no_mem_embed.data.fill_(float("nan"))
    embeddings = open_embeddings(_options(cache="disk"), network=Network(model, "decoder", CPU))
    with pytest.raises(ModelInvalidError, match=r"images/train/000\.png .*NaN"):
        embeddings.fill(_ignore)


def test_a_batch_has_all_that_a_step_needs(
    samples: Samples, open_embeddings: Callable[..., Embeddings]
) -> None:
    options = _options()
    embeddings = open_embeddings(options)
    embeddings.fill(_ignore)
    first = list(batches(samples, embeddings, options, 1))
    assert [len(batch.frozen[0]) for batch in first] == [3, 3, 1]
    for batch in first:
        assert [part.dtype for part in batch.frozen] == [torch.float16] * 3
        assert batch.masks.shape == (len(batch.image_of), PX, PX)
        assert batch.image_of.unique().tolist() == list(range(len(batch.frozen[0])))
        assert int(batch.image_of.bincount().max()) <= options.objects
    assert sum(len(batch.masks) for batch in first) == 1 + 2 + 3 + 1 + 3 + 1 + 3


def test_batches_follow_from_seed_and_epoch_alone(
    samples: Samples, open_embeddings: Callable[..., Embeddings]
) -> None:
    options = _options()
    embeddings = open_embeddings(options)
    embeddings.fill(_ignore)
    third = list(batches(samples, embeddings, options, 3))
    torch.manual_seed(99)
    _assert_equal(list(batches(samples, embeddings, options, 3)), third)
    for other in (
        batches(samples, embeddings, options, 2),
        batches(samples, embeddings, _options(seed=6), 3),
    ):
        counts = [batch.masks.sum().item() for batch in other]
        assert counts != [batch.masks.sum().item() for batch in third]


def test_the_objects_of_an_image_take_turns(
    samples: Samples, open_embeddings: Callable[..., Embeddings]
) -> None:
    options = _options(fliplr=0, objects=2, batch=7)
    embeddings = open_embeddings(options)
    embeddings.fill(_ignore)
    seen = {
        mask.numpy().tobytes()
        for epoch in range(1, 30)
        for batch in batches(samples, embeddings, options, epoch)
        for mask in batch.masks
    }
    assert len(seen) == samples.object_count


def test_leaving_batches_early_ends_the_thread(
    samples: Samples, open_embeddings: Callable[..., Embeddings]
) -> None:
    options = _options(batch=1)
    before = set(threading.enumerate())
    with contextlib.closing(batches(samples, open_embeddings(options), options, 1, threads=1)) as some:
        next(some)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_a_broken_image_is_told_from_the_thread(
    tmp_path: Path, network: Network, open_embeddings: Callable[..., Embeddings]
) -> None:
    broken = Samples(tmp_path, sam2_pictures.split(tmp_path, [1, 1]), PX)
    (tmp_path / broken.labelled(1).path).write_bytes(b"cut off")
    options = _options()
    memory = Memory(options, CPU, lambda _: None)
    embeddings = Embeddings(broken, network, memory, options, [], path=tmp_path / "e", limit_bytes=0)
    with pytest.raises(DatasetInvalidError, match=r"images/train/001\.png"):
        list(batches(broken, embeddings, options, 1, threads=1))


def test_memory_is_flat_over_epochs(samples: Samples, open_embeddings: Callable[..., Embeddings]) -> None:
    options = _options(cache="disk")
    embeddings = open_embeddings(options)
    embeddings.fill(_ignore)
    process = psutil.Process()
    sizes = []
    for round_ in range(3):
        for epoch in range(60):
            for _ in batches(samples, embeddings, options, 60 * round_ + epoch):
                pass
        sizes.append(process.memory_info().rss)
    # A round hands out 60 times 7 entries and 14 masks: 14 MB and 3 MB.
    assert sizes[2] - sizes[0] < 4e6
