"""What was measured, under the names that reports use."""

from __future__ import annotations

from typing import Any


def figures(metrics: Any, names: list[str]) -> dict[str, Any]:
    """Return what was measured, over all and by class; for segmentation masks beside boxes.

    A class without instances in the split has no figures (None).
    """
    results = {key: float(value) for key, value in metrics.results_dict.items()}
    place = {int(class_id): row for row, class_id in enumerate(metrics.ap_class_index)}
    kinds = {"": metrics.box, **({"mask": metrics.seg} if hasattr(metrics, "seg") else {})}
    per_class: dict[str, Any] = {}
    for class_id, name in enumerate(names):
        entry: dict[str, Any] = {
            "images": int(metrics.nt_per_image[class_id]),
            "instances": int(metrics.nt_per_class[class_id]),
        }
        for kind, metric in kinds.items():
            row = place.get(class_id)
            values = [None] * 4 if row is None else [float(value) for value in metric.class_result(row)]
            values_by_name = dict(zip(("precision", "recall", "mAP50", "mAP50-95"), values, strict=True))
            entry.update({kind: values_by_name} if kind else values_by_name)
        per_class[name] = entry
    return {**box_and_mask(results), "fitness": results["fitness"], "per_class": per_class}


def box_and_mask(results: dict[str, float]) -> dict[str, Any]:
    """Return ``{precision, recall, mAP50, mAP50-95}`` of boxes, and of masks under ``mask`` if there are."""
    boxes, masks = (
        {key[len("metrics/") : -len(tail)]: value for key, value in results.items() if key.endswith(tail)}
        for tail in ("(B)", "(M)")
    )
    return {**boxes, "mask": masks} if masks else boxes
