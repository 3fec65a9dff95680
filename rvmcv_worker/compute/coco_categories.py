"""The classes of a data set in COCO's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rvmcv_worker.compute.coco_json import Category, CocoFile
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.errors import DatasetInvalidError


def classes_of(cocos: Sequence[CocoFile], warnings: list[str]) -> dict[int, str]:
    """Return the classes' names by their categories' ids, in the order of the ids, which may have gaps.

    Raises `DatasetInvalidError` when two files do not mean the same by an id.
    """
    known: dict[int, tuple[Category, str]] = {}
    for coco in cocos:
        for category_id, category in coco.categories.items():
            before, file = known.setdefault(category_id, (category, coco.name))
            if before.name != category.name:
                raise DatasetInvalidError(
                    f"category {printable(str(category_id), 30)} is '{printable(before.name, 100)}' in "
                    f"{printable(file)} and '{printable(category.name, 100)}' in {printable(coco.name)}; "
                    "give all splits the same categories"
                )
    categories = {category_id: known[category_id][0] for category_id in sorted(known)}
    used = {found.category for coco in cocos for many in coco.annotations.values() for found in many}
    below = Counter(category.supercategory for category in categories.values())
    classes: dict[int, str] = {}
    for category_id, category in categories.items():
        others = below[category.name] - (category.supercategory == category.name)
        if others and category_id not in used:
            # Roboflow's first category is the project: above the classes, and no object is one.
            shown = printable(category.name, 100)
            warnings.append(f"category '{shown}' is above others and has no object: it is no class")
        else:
            classes[category_id] = category.name
    if not classes:
        raise DatasetInvalidError(
            f"{printable(cocos[0].name)} has no categories, which name the classes; export it again"
        )
    return classes
