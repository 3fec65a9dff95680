"""Small models with random weights, and what Ultralytics alone says with them: a command of its own.

    python -m tests.plain_ultralytics ROOT

Makes `in/*.pt` beneath ROOT, predicts every picture of `pictures/` with each of the `asked` settings of
`asked.json`, and writes `said.json`: {name of the setting: {picture: {"size", "pixels", "detections"}}}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rvmcv_worker.compute import ultralytics_env

root = Path(sys.argv[1])
ultralytics_env.isolate(root / "plain")

import torch  # noqa: E402
from ultralytics import YOLO  # noqa: E402
from ultralytics.utils.patches import imread  # noqa: E402


def make(name: str, architecture: str, seed: int) -> None:
    """Save a model that sees a few things, others in each picture: no training is needed for that."""
    torch.manual_seed(seed)
    yolo = YOLO(f"{architecture}.yaml")
    head = yolo.model.model[-1]
    # Batch norms take on what they see; then the class scores are spread until some pass a threshold.
    for layer in yolo.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    yolo.model.train()
    seen: dict[int, torch.Tensor] = {}
    for number, branch in enumerate(head.cv3):
        branch[-1].register_forward_hook(lambda _layer, _in, out, number=number: seen.update({number: out}))
    with torch.no_grad():
        for _ in range(2):
            yolo.model(torch.rand(4, 3, 8, 8).repeat_interleave(12, -1).repeat_interleave(12, -2))
        yolo.model.eval()
        yolo.model(torch.rand(4, 3, 8, 8).repeat_interleave(12, -1).repeat_interleave(12, -2))
        for number, branch in enumerate(head.cv3):
            scale = 1.5 / seen[number].std(dim=(0, 2, 3))
            mean = (seen[number] - branch[-1].bias.view(-1, 1, 1)).mean(dim=(0, 2, 3))
            branch[-1].weight.mul_(scale.view(-1, 1, 1, 1))
            branch[-1].bias.copy_(-3.0 - mean * scale)
            branch[-1]._forward_hooks.clear()
    torch.save({"model": yolo.model.half(), "train_args": {"imgsz": 96}}, root / "in" / name)


def say(model: str, picture: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what Ultralytics makes of a picture."""
    image = imread(picture)
    assert image is not None
    (result,) = YOLO(root / "in" / model).predict(picture, verbose=False, retina_masks=True, **options)
    masks = [] if result.masks is None else result.masks.data.bool().cpu().numpy()
    return {
        "size": [image.shape[1], image.shape[0]],
        "pixels": hashlib.sha256(image.tobytes()).hexdigest(),
        "detections": [
            {"class": result.names[number], "confidence": score, "bbox": box}
            for number, score, box in zip(
                result.boxes.cls.int().tolist(),
                result.boxes.conf.tolist(),
                result.boxes.xyxy.tolist(),
                strict=True,
            )
        ],
        "masks": [hashlib.sha256(mask.tobytes()).hexdigest() for mask in masks],
    }


def main() -> None:
    """Make the models, predict, write down."""
    make("first.pt", "yolo11n", 1)
    make("second.pt", "yolo11n", 2)
    make("segment.pt", "yolo11n-seg", 3)
    asked = json.loads((root / "asked.json").read_text())
    said = {
        name: {
            picture.name: say(setting["model"], picture, setting["options"])
            for picture in sorted((root / "pictures").iterdir())
        }
        for name, setting in asked.items()
    }
    (root / "said.json").write_text(json.dumps(said))


main()
