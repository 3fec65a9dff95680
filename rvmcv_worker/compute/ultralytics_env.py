"""Makes Ultralytics quiet, offline and distrustful; all of it must stand before its first import.

With these switches a training touches the network zero times; without them it asks DNS, PyPI, an
analytics host and GitHub. Some things it does are not covered by any switch: the font is put where
it looks for one, so that it does not download it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from rvmcv_worker.errors import InternalError

#: Version of the settings file's layout; Ultralytics rewrites a file of another version.
_SETTINGS_VERSION = "0.0.8"


def isolate(directory: Path) -> None:
    """Point Ultralytics, matplotlib and torch at `directory`/.config and at nothing else.

    `directory` is the child's own. Raises `InternalError` when Ultralytics was imported before.
    """
    if "ultralytics" in sys.modules:
        raise InternalError(
            "ultralytics was imported before it was isolated: its switches have no effect any more"
        )
    config = isolate_others(directory)
    ultralytics = config / "Ultralytics"  # Ultralytics appends this name itself
    ultralytics.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        {
            "YOLO_OFFLINE": "1",
            "YOLO_AUTOINSTALL": "0",
            "ULTRALYTICS_SAFE_LOAD": "1",
            "YOLO_CONFIG_DIR": str(config),
            # The one switch for its bars' pace: a line a minute, not ten a second, into the job's log.
            "GITHUB_ACTIONS": "true",
        }
    )
    settings = {
        "settings_version": _SETTINGS_VERSION,
        "datasets_dir": str(config / "datasets"),
        "weights_dir": str(config / "weights"),
        "runs_dir": str(config / "runs"),
        "uuid": "0" * 64,
        "sync": False,
        "api_key": "",
        "openai_api_key": "",
        **dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb"), False),
        "vscode_msg": False,
        "openvino_msg": False,
    }
    (ultralytics / "settings.json").write_text(json.dumps(settings, indent=2))
    for name in ("Arial.ttf", "Arial.Unicode.ttf"):
        shutil.copyfile(any_font(), ultralytics / name)


def isolate_others(directory: Path) -> Path:
    """Point matplotlib and torch at `directory`/.config, and return that."""
    config = directory / ".config"
    os.environ.update(
        {
            "MPLCONFIGDIR": str(config / "matplotlib"),
            "MPLBACKEND": "agg",
            "TORCH_HOME": str(config / "torch"),
            "TORCHINDUCTOR_CACHE_DIR": str(config / "inductor"),
            "TRITON_CACHE_DIR": str(config / "triton"),
            "XDG_CACHE_HOME": str(config / "cache"),
        }
    )
    return config


def require_safe_load() -> None:
    """Raise `InternalError` unless checkpoints are loaded with `weights_only`.

    Ultralytics switches that protection off by itself, without a word, when torch is too old for it.
    """
    import torch
    from ultralytics.nn.tasks import _SafeLoad
    from ultralytics.utils import SAFE_LOAD

    if not (SAFE_LOAD and _SafeLoad.restricted()):
        raise InternalError(
            f"checkpoints would be opened without protection: ULTRALYTICS_SAFE_LOAD is not in force "
            f"with torch {torch.__version__}; install the versions of requirements.lock"
        )


def any_font() -> Path:
    """Return the font that matplotlib brings along, found without importing it: most scripts but CJK."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise InternalError("matplotlib is not installed: install rvmcv-worker[compute]")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
