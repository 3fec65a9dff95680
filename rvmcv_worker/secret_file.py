"""A secret in a file of its own: who may read it, and what may stand in it.

No message here holds anything of a file's content.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

#: Longest secret, in bytes; a larger file is something else.
MAX_BYTES = 8192
#: Variables by which somebody may mean to hand a secret over.
_VARIABLE = re.compile(r"RVMCV_(\w+_)?(TOKEN|KEY|SECRET|PASSWORD)")


class SecretFileError(Exception):
    """The secret cannot be taken from where it is; the message says what to do."""


def read(file: Path, *, empty_is_none: bool = False) -> str | None:
    """Return the secret that `file` holds, without the line break at its end; None where no file is.

    `empty_is_none`: an empty one stands for none too.

    Raises `SecretFileError` for one that others can read, that a stranger may have put there, or whose
    content no header can carry: a server's answer to that would mislead.
    """
    try:
        # A FIFO would hold up the worker's start, a link may lead where a stranger writes.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SecretFileError(f"{file}: cannot be read: {_advice(error)}") from None
    try:
        _refuse_unfit(file, os.fstat(descriptor))
        content = os.read(descriptor, MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise SecretFileError(f"{file}: larger than {MAX_BYTES} bytes: write the secret alone into the file")
    try:
        secret = content.decode().strip()
    except UnicodeDecodeError as error:
        raise SecretFileError(
            f"{file}: byte {error.start + 1} of {len(content)} is no text: write the secret alone into the "
            "file, as it was issued"
        ) from None
    if not secret:
        if empty_is_none:
            return None
        raise SecretFileError(f"{file}: empty: write the secret into it, or remove the file")
    _refuse_odd_characters(secret, file)
    return secret


def _advice(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a link: put the file with the secret itself there"
    if error.errno == errno.EACCES:
        return f"{error.strerror}: use systemd's LoadCredential=, or chown it to the worker's user"
    return error.strerror or type(error).__name__


def _refuse_unfit(file: Path, found: os.stat_result) -> None:
    """Raise for what is no regular file, and for one that others can read, write or have made.

    Others are all users but root and the worker's own. A file of root's may be one that its group can read:
    so it reaches a service's user, with the ACL of a systemd credential too, whose mode is then 0440.
    """
    if not stat.S_ISREG(found.st_mode):
        raise SecretFileError(f"{file}: not a regular file: put the file with the secret itself there")
    if found.st_uid not in {0, os.geteuid()}:
        raise SecretFileError(
            f"{file}: user {found.st_uid}, whose it is, can change it: chown it to root or the worker's user"
        )
    ways = [parent.stat().st_mode for parent in file.resolve().parents]
    everyone = all(mode & stat.S_IXOTH for mode in ways)
    group = all(mode & (stat.S_IXOTH | stat.S_IXGRP) for mode in ways)
    if everyone and found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SecretFileError(f"{file}: every user of this machine can read or write it: chmod 600 {file}")
    denied = stat.S_IWGRP if found.st_uid == 0 else stat.S_IRGRP | stat.S_IWGRP
    if group and found.st_mode & denied:
        raise SecretFileError(f"{file}: group {found.st_gid} can read or write it: chmod 600 {file}")


def _refuse_odd_characters(secret: str, file: Path) -> None:
    for number, character in enumerate(secret, 1):
        if not "!" <= character <= "~":
            what = "a space or line break" if character.isspace() else f"U+{ord(character):04X}"
            raise SecretFileError(
                f"{file}: character {number} of {len(secret)} is {what}, which no token has: write the token "
                "alone into the file, as it was issued"
            )


def refuse_in_environment(secrets: Iterable[str]) -> None:
    """Raise for a variable that holds one of `secrets`, or by whose name one may be meant to be given.

    The environment is inherited, and every process of the same user can read it.
    """
    known = set(secrets)
    for name, value in os.environ.items():
        if value in known or (value and _VARIABLE.fullmatch(name)):
            raise SecretFileError(
                f"the environment variable {name} holds a secret, which other processes can read: write it "
                "into a file, or use systemd's LoadCredential=, and remove the variable"
            )
