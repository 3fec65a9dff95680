"""Under which licences the worker's packages are, and whether AGPL-3.0-or-later goes with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution

from audit import locked

#: SPDX identifiers of what may be combined with and handed on under AGPL-3.0-or-later.
COMPATIBLE = frozenset(
    {
        *("0BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0"),
        *("MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
        *("Apache-2.0", "Apache-2.0 WITH LLVM-exception", "MPL-2.0"),
        *("LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later"),
        *("AGPL-3.0-only", "AGPL-3.0-or-later"),
    }
)

#: Packages under other terms, by pattern -> why the worker may use them. None is a part of what we hand on:
#: our wheel holds our files alone, and whoever installs it gets these from their makers. An image that has
#: them installed is another matter: they are not to be handed on with it under the AGPL.
NOT_HANDED_ON = {
    "nvidia-*": "CUDA's libraries, which torch uses; NVIDIA's terms",
    "cuda-*": "CUDA's libraries, which torch uses; NVIDIA's terms",
    "regex": "CNRI-Python beside Apache-2.0; of moto's, for the reference server only",
}

#: What packages say in their own words, in lower case -> SPDX.
_IN_OWN_WORDS = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "agpl-3.0": "AGPL-3.0-or-later",
    "bsd": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "freebsd": "BSD-2-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "mit licensed, as found in the license file": "MIT",
    "psfl": "PSF-2.0",
}

#: The classifiers that leave no doubt -> SPDX. "BSD License" may be any of three, all compatible.
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


@dataclass(frozen=True)
class Licensed:
    """A package with its licence; `why_not` is None where that is compatible."""

    name: str
    version: str
    licence: str
    why_not: str | None

    @property
    def excused(self) -> str | None:
        """Why an incompatible one may be used all the same."""
        return next((why for name, why in NOT_HANDED_ON.items() if fnmatch.fnmatch(self.name, name)), None)


def table() -> list[Licensed]:
    """Return every package of the lock that is installed."""
    return [_of(distribution) for distribution in locked.installed()]


def faults(packages: list[Licensed]) -> list[str]:
    """Say which packages have a licence that does not go with ours, and are not excused."""
    return [
        f"{each.name} {each.version}: {each.licence}: {each.why_not}"
        for each in packages
        if each.why_not and not each.excused
    ]


def lines(packages: list[Licensed]) -> Iterator[str]:
    """Yield the table, and the excuses below it."""
    width = max(len(f"{each.name} {each.version}") for each in packages)
    for each in packages:
        mark = "" if each.why_not is None else " *" if each.excused else " !"
        yield f"{f'{each.name} {each.version}':<{width}}  {each.licence}{mark}"
    yield ""
    yield "* not handed on with the worker:"
    yield from (f"  {name}: {why}" for name, why in NOT_HANDED_ON.items())


def judge(expression: str) -> str | None:
    """Return why an SPDX expression is not compatible; None if it is. One of several `OR` is enough.

    `AND` binds closer. With parentheses all that is named has to be compatible: who means less reads it.
    """
    choices = [choice.split(" AND ") for choice in expression.split(" OR ")]
    if "(" in expression:
        choices = [[part.strip("() ") for parts in choices for part in parts]]
    refused = [[part for part in parts if part not in COMPATIBLE] for parts in choices]
    if not all(refused):
        return None
    return f"{', '.join(part for parts in refused for part in parts)} is not known to go with ours"


def _of(distribution: Distribution) -> Licensed:
    licence = declared(distribution)
    why_not = judge(licence) if licence else "says no licence that can be read"
    name = locked.normal(distribution.metadata["Name"])
    return Licensed(name, distribution.version, licence or "unknown", why_not)


def declared(distribution: Distribution) -> str | None:
    """Return what a package declares as SPDX: its expression, else its words, else its classifiers."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    words = metadata["License"].strip() if "License" in metadata else ""
    if words in COMPATIBLE or ("\n" not in words and (" AND " in words or " OR " in words)):
        return words
    if known := _IN_OWN_WORDS.get(words.lower()):
        return known
    classifiers = [
        str(each).rpartition(" :: ")[2]
        for each in metadata.get_all("Classifier") or ()
        if str(each).startswith("License :: ")
    ]
    found = [_CLASSIFIERS[each] for each in classifiers if each in _CLASSIFIERS]
    if found and len(found) == len(classifiers):
        return " OR ".join(dict.fromkeys(found))
    return words if words and len(words) < 100 and "\n" not in words else None
