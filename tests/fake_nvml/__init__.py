"""A compiled `libnvidia-ml.so.1` whose answers a test changes while the daemon runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")


class FakeNvml:
    """The library in a directory of its own, and the file with its answers; `fake_nvml.c` tells the keys."""

    def __init__(self, directory: Path, **answers: int) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc) to build the fake libnvidia-ml.so.1 with")
        self._answers: dict[str, int] = {}
        self._file = directory / "answers"
        self._built = directory / "libnvidia-ml.so.built"
        #: The library by the name that the worker loads.
        self.library = directory / "lib" / "libnvidia-ml.so.1"
        self.library.parent.mkdir(parents=True)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(SOURCE), "-o", str(self._built)],
            check=True,
        )
        self.set(**answers)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {"LD_LIBRARY_PATH": str(self.library.parent), "FAKE_NVML": str(self._file)}

    def install(self) -> FakeNvml:
        """Put the library in its place."""
        shutil.copy(self._built, self.library)
        return self

    def set(self, **answers: int) -> None:
        """Change answers; `gpu0_error=15` is the key `gpu0.error`."""
        self._answers |= {_key(name): number for name, number in answers.items()}
        self._write()

    def reset(self) -> None:
        """Answer as at first, but for Xids, which are counted."""
        self._answers = {key: number for key, number in self._answers.items() if key.endswith(".xids")}
        self._write()

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text("".join(f"{key} {number}\n" for key, number in self._answers.items()))
        part.replace(self._file)


def _key(name: str) -> str:
    gpu, _, rest = name.partition("_")
    return f"{gpu}.{rest}" if gpu.startswith("gpu") else name
