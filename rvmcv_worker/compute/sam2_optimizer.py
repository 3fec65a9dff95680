"""What each parameter learns at, and how that changes over a training.

From Meta's fine-tuning config, `configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml` of the `sam2`
package: AdamW with weight decay 0.1, none on biases and norms; 5e-6 and for the encoder 3e-6; cosine to a
tenth. The warm-up is ours: Adam's first steps are as long as its later ones, however small the gradient.
"""

from __future__ import annotations

import math

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import nn

from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.sam2_options import Sam2Options

#: The encoder's learning rate is this of the decoder's: 3e-6 of 5e-6.
_ENCODER = 0.6
#: And each block of the trunk this of the next one's; Clark et al., "ELECTRA", 2020, and Meta's config.
_PER_BLOCK = 0.9
_TRUNK = "image_encoder.trunk."


def optimizer(network: Network, options: Sam2Options, lr0: float) -> torch.optim.AdamW:
    """Return AdamW over all that is trained, its state in place, so that no later step allocates any.

    A group's `initial_lr` is its learning rate before `learning_rate` is multiplied in.
    """
    decayed = _decayed(network.model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.trained_parameters().items():
        key = lr0 * _share_of_lr(name, network.model), options.weight_decay if name in decayed else 0.0
        groups.setdefault(key, []).append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,  # no temporary copies either: a step is done whole, or memory runs out before it
    )
    for parameter in network.trained_parameters().values():
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return adamw


def learning_rate(options: Sam2Options, step: int, steps_per_epoch: int) -> float:
    """Return the factor of each learning rate at a step, from 0: a line up to 1, then a cosine down to `lrf`.

    The last step of the last epoch is at `lrf`.
    """
    warmup = min(round(options.warmup_epochs * steps_per_epoch), options.epochs * steps_per_epoch - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    last = options.epochs * steps_per_epoch - 1
    done = min((step - warmup) / max(last - warmup, 1), 1.0)
    return options.lrf + (1 - options.lrf) * (1 + math.cos(math.pi * done)) / 2


def _decayed(model: nn.Module) -> set[str]:
    """Return the names of weights that multiply: no biases, no norms, no embeddings."""
    multiplies = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, multiplies)}


def _share_of_lr(name: str, model: SAM2Base) -> float:
    if not name.startswith("image_encoder."):
        return 1.0
    if not name.startswith(_TRUNK) or "pos_embed" in name:  # Meta's config takes those from the decay
        return _ENCODER
    trunk = model.image_encoder.trunk
    above = trunk.get_num_layers() + 1 - trunk.get_layer_id(name.removeprefix(_TRUNK))
    return _ENCODER * float(_PER_BLOCK**above)
