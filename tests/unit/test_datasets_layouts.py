"""Where people keep images, labels and splits, and what twelve real `data.yaml` say about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rvmcv_worker.compute.data_yaml import DataYaml, read_data_yaml
from rvmcv_worker.compute.layouts import plan
from rvmcv_worker.errors import DatasetInvalidError
from tests.dataset_fixtures import BOX, Prepared, draw, pack, yolo


def pairs(files: list[str], hints: DataYaml | None = None) -> dict[str, dict[str, str | None]]:
    layout = plan(files, hints or DataYaml())
    return {split: {item.image: item.label for item in items} for split, items in layout.splits.items()}


@pytest.mark.parametrize(
    ("image", "label", "split"),
    [
        ("images/train/a.jpg", "labels/train/a.txt", "train"),
        ("train/images/a.jpg", "train/labels/a.txt", "train"),
        ("top/valid/images/a.jpg", "top/valid/labels/a.txt", "val"),
        ("top/images/validation/a.PNG", "top/labels/validation/a.txt", "val"),
        ("images/train2017/a.jpg", "labels/train2017/a.txt", "train"),
        ("Images/Test/a.jpeg", "Labels/Test/a.TXT", "test"),
        ("test/train/images/a.jpg", "test/train/labels/a.txt", "train"),
        ("train/a.jpg", "train/a.txt", "train"),
        ("train/a.jpg", "labels/train/a.txt", "train"),
        ("images/a.jpg", "labels/a.txt", "train"),
        ("images/a.jpg", "images/a.txt", "train"),
        ("a.jpg", "a.txt", "train"),
        ("a.jpg", "labels/a.txt", "train"),
        ("train/images/deep/a.v2.jpg", "train/labels/deep/a.v2.txt", "train"),
    ],
)
def test_images_find_their_label_and_split(image: str, label: str, split: str) -> None:
    assert pairs([image, label]) == {split: {image: label}}


def test_a_label_elsewhere_is_not_anyones() -> None:
    assert pairs(["train/images/a.jpg", "val/images/a.jpg", "val/labels/a.txt"]) == {
        "train": {"train/images/a.jpg": None},
        "val": {"val/images/a.jpg": "val/labels/a.txt"},
    }


def test_labels_without_image_and_images_without_split_are_told() -> None:
    layout = plan(
        [
            "images/train/a.jpg",
            "labels/train/a.txt",
            "labels/train/b.txt",
            "labels/train/classes.txt",
            "logo.png",
        ],
        DataYaml(),
    )
    assert layout.warnings == (
        "1 image(s) outside the splits are not used, as 'logo.png'",
        "1 label file(s) without an image, as 'labels/train/b.txt'",
    )


def test_no_folder_below_a_split_is_called_images() -> None:
    """Ultralytics looks for labels by the last folder of that name."""
    (item,) = plan(["train/one/images/a.jpg", "train/one/labels/a.txt"], DataYaml()).splits["train"]
    assert (item.target, item.label_target) == ("one/images_/a.jpg", "one/images_/a.txt")
    assert item.label == "train/one/labels/a.txt"


def test_the_order_of_files_is_kept() -> None:
    files = [
        f"set/train/images/{name}" for name in ("b.jpg", "B.JPG.png", "a/x.jpg", "a.jpg", "a-1.jpg", "é.jpg")
    ]
    items = plan(files, DataYaml()).splits["train"]
    assert [item.image for item in items] == sorted(files)
    assert [item.target for item in items] == sorted(item.target for item in items)


# What each of the real files means, with an archive as its owner would pack it.
REAL = {
    "AyeshaImran_roboflow_dotdot.yaml": (
        "",
        {"train": ["train/images"], "val": ["valid/images"], "test": ["test/images"]},
    ),
    "CuDinh03_no_path.yaml": ("", {"train": ["train/images"], "val": ["valid/images"]}),
    "ananyajha9_absolute_windows_no_path_key.yaml": (
        "TDL_Project/",
        {"train": ["train/images"], "val": ["val/images"], "test": ["test/images"]},
    ),
    "biney17_backslash_path.yaml": ("waste_dataset/", {"train": ["train/images"], "val": ["val/images"]}),
    "combox1234_two_datasets_windows_spaces.yaml": (
        "most recent vrs/",
        {
            "train": ["can_dataset/train/images", "plastic_bottle_dataset/train/images"],
            "val": ["can_dataset/valid/images", "plastic_bottle_dataset/valid/images"],
            "test": ["plastic_bottle_dataset/test/images"],
        },
    ),
    "devepro_data_bottle.yaml": ("bottle/", {"train": ["train/images"], "val": ["valid/images"]}),
    "devepro_no_test.yaml": ("", {"train": ["train/images"], "val": ["valid/images"]}),
    "facerrr_bottle.yaml": (
        "",
        {"train": ["train/images"], "val": ["valid/images"], "test": ["test/images"]},
    ),
    "facerrr_trash_windows_path.yaml": ("trash_data/", {"train": ["images/train"], "val": ["images/val"]}),
    "hallabee_CAN_DETECTION.yaml": (
        "data/",
        {"train": ["train/images"], "val": ["valid/images"], "test": ["test/images"]},
    ),
    "jjuundd_names_dict.yaml": (
        "Trash-Detection-1/",
        {"train": ["train/images"], "val": ["valid/images"], "test": ["test/images"]},
    ),
    "lightly_coco128_config.yaml": ("", {"train": ["images/train2017"], "val": ["images/val2017"]}),
}


def test_the_real_yaml_are_all_known(shared: Path) -> None:
    assert {file.name for file in (shared / "datasets/defective/data_yaml_as_found").iterdir()} == set(REAL)


@pytest.mark.parametrize("place", ["inside the set", "at the top", "packed without the top folder"])
@pytest.mark.parametrize("name", REAL)
def test_a_real_yaml_leads_to_the_folders_it_means(
    tmp_path: Path, shared: Path, name: str, place: str
) -> None:
    top, splits = REAL[name]
    if place == "packed without the top folder":
        top = ""
    (tmp_path / top).mkdir(exist_ok=True)
    where = "data.yaml" if place == "at the top" else f"{top}data.yaml"
    (tmp_path / where).write_bytes((shared / "datasets/defective/data_yaml_as_found" / name).read_bytes())
    files = [where, "README.roboflow.txt"]
    expected: dict[str, dict[str, str | None]] = {}
    for split, folders in splits.items():
        for number, folder in enumerate(folders):
            image = f"{top}{folder}/picture_{number}.jpg"
            label = "labels".join(image.rsplit("images", 1)).replace(".jpg", ".txt")
            files += [image, label]
            expected.setdefault(split, {})[image] = label
    hints = read_data_yaml(tmp_path, files)
    layout = plan(files, hints)
    assert {s: {item.image: item.label for item in items} for s, items in layout.splits.items()} == expected
    assert hints.names
    assert not layout.warnings


def test_a_real_set_of_two_prepares_in_order(tmp_path: Path, shared: Path) -> None:
    name = "combox1234_two_datasets_windows_spaces.yaml"
    files = {"data.yaml": (shared / "datasets/defective/data_yaml_as_found" / name).read_bytes()}
    seed = 0
    for folders in REAL[name][1].values():
        for folder in folders:
            for stem in ("a", "b"):
                seed += 1
                files[f"{folder}/{stem}.jpg"] = draw(seed)
                files[f"{folder.replace('images', 'labels')}/{stem}.txt"] = BOX
    prepared = Prepared(tmp_path)
    pack(prepared.archive, files)
    report = prepared.run()
    assert prepared.images("train") == ["00/a.jpg", "00/b.jpg", "01/a.jpg", "01/b.jpg"]
    assert (prepared.data / "images/train/01/a.jpg").read_bytes() == files[
        "plastic_bottle_dataset/train/images/a.jpg"
    ]
    assert report["names"] == ["Cans", "Plastic", "Bottle"]
    assert report["splits"]["test"]["images"] == 2


def test_a_val_folder_that_is_not_there_is_not_taken_for_another() -> None:
    files = [f"train/images/{index}.jpg" for index in range(5)]
    layout = plan(
        files, DataYaml(file="data.yaml", splits={"train": ("../train/images",), "val": ("../valid/images",)})
    )
    assert set(layout.splits) == {"train"}
    assert layout.warnings == ("data.yaml names '../valid/images' for val: the archive has no such folder",)


def test_a_list_of_images_is_not_read() -> None:
    files = ["images/train/a.jpg", "images/val/b.jpg", "train.txt"]
    layout = plan(files, DataYaml(file="data.yaml", splits={"train": ("train.txt",)}))
    assert set(layout.splits) == {"train", "val"}
    assert layout.warnings == ("data.yaml names 'train.txt' for train: lists of images are not read",)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [a, b]", ("a", "b")),
        ("names:\n  1: b\n  0: a", ("a", "b")),
        ("names: {0: no, 1: 12, 2: 'null '}", ("no", "12", "null")),
        ("nc: 2\nnames:\n", ("class_0", "class_1")),
        ("names: !!python/object/apply:os.system ['exit 1']", ("exit 1",)),  # the tag means nothing
        ("names: [Flasche, 'Dös\u202ee']", ("Flasche", "Dös\\u202ee")),
    ],
)
def test_class_names(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "data.yaml").write_text(text, encoding="utf-8")
    assert read_data_yaml(tmp_path, ["data.yaml"]).names == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\nnc: 1", r"set/data\.yaml:2"),
        ("names: {1: a, 2: b}", "numbered 0 to 1"),
        ("names: bottle", "list of class names"),
        ("names: [a, [b]]", "list of class names"),
        ("names: [a, a]", "'a' is the name of two classes"),
        ("names: [a, '']", "class 1 has no name"),
        ("a: &x [1]\nnames: [*x, *x]", r"set/data\.yaml:2 is not YAML: aliases"),
        ("names: " + "[" * 5_000, "not YAML"),
        ("names: \x00", "not YAML"),
    ],
)
def test_a_yaml_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DatasetInvalidError, match=message):
        read_data_yaml(tmp_path, ["set/data.yaml"])


def test_names_win_over_nc_and_the_topmost_yaml_over_others(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "hyp.yaml").write_text("lr0: 0.01\n")
    (tmp_path / "waste.yaml").write_text("names: [a]\nnc: 5\ndownload: import os; os.abort()\n")
    (tmp_path / "sub" / "data.yaml").write_text("names: [b]\n")
    hints = read_data_yaml(tmp_path, ["sub/data.yaml", "hyp.yaml", "waste.yaml"])
    assert (hints.file, hints.names) == ("waste.yaml", ("a",))
    assert hints.warnings == (
        "waste.yaml says nc: 5 but names 1 classes, which counts",
        "waste.yaml is used; 1 other YAML file(s) are not read",
    )


def test_files_of_a_drawn_set_are_placed_with_their_names(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    files = yolo(3, top="my set/")
    pack(prepared.archive, {**files, "my set/classes.txt": b"Bottle\nCan\n"})
    assert prepared.run()["names"] == ["Bottle", "Can"]
    assert prepared.images("train") == ["train_000.jpg", "train_001.jpg", "train_002.jpg"]
