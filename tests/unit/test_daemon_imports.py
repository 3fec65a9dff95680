from __future__ import annotations

import subprocess
import sys

#: What the daemon must never load: it holds the secrets, and these parse what strangers made.
FORBIDDEN = (
    "torch",
    "torchvision",
    "ultralytics",
    "numpy",
    "PIL",
    "cv2",
    "yaml",
    "sam2",
    "fastapi",
    "sqlalchemy",
)


def test_the_daemon_loads_nothing_that_parses_what_a_stranger_made() -> None:
    code = (
        "import sys, pkgutil, importlib, rvmcv_worker\n"
        "others = ('compute', 'reference', 'demo')\n"
        "for module in pkgutil.walk_packages(rvmcv_worker.__path__, 'rvmcv_worker.'):\n"
        "    if module.name.split('.')[1] not in others:\n"
        "        importlib.import_module(module.name)\n"
        f"loaded = [name for name in {FORBIDDEN!r} if name in sys.modules]\n"
        "print(loaded, 'rvmcv_worker.daemon' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] True"
