"""API keys: 256 random bits each, of which a server knows only the SHA-256 digests.

A slow hash, as passwords need, would add nothing: nobody can try 2^256 keys.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from errors import UserError

LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):([0-9a-f]{64})")


def new_key(name: str) -> tuple[str, str]:
    """Returns a new key, and the line name:digest that lets a server know it."""
    key = secrets.token_urlsafe(32)
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(file: str, text: str = "") -> dict[str, str]:
    """Returns digests by name, from a file of lines name:digest and from a text of such words.

    `#` begins a comment of the file. Raises UserError for anything else, and does not repeat it, as
    it may be a key; and for two keys of a name.
    """
    found = _parsed(re.split(r"[\s,]+", text.strip()), "ARCHCOMPARE_KEYS: word")
    if file:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--keys_file={file} cannot be read: {error}") from error
        more = _parsed((line.partition("#")[0].strip() for line in lines), f"{file}: line")
        if not more:
            raise UserError(f"--keys_file={file} holds no key: --new_key=NAME makes one")
        if twice := found.keys() & more:
            raise UserError(
                f"{min(twice)} has a key in {file} and one in ARCHCOMPARE_KEYS: remove one of them"
            )
        found |= more
    return found


def _parsed(words: Iterable[str], place: str) -> dict[str, str]:
    found = {}
    for number, word in enumerate(words, 1):
        if not word:
            continue
        match = LINE.fullmatch(word)
        if not match:
            raise UserError(
                f"{place} {number} is not NAME:DIGEST, with the 64 hexadecimal digits of a SHA-256 "
                "digest: --new_key=NAME prints such a line"
            )
        if match[1] in found:
            raise UserError(f"{place} {number}: there are two keys of the name {match[1]}")
        found[match[1]] = match[2]
    return found


def name_of(key: bytes, known: dict[str, str]) -> str | None:
    """Returns the name of a key, None if there is none; takes as long for one as for the other."""
    digest, found = hashlib.sha256(key).hexdigest(), None
    for name, stored in known.items():
        if hmac.compare_digest(digest, stored):
            found = name
    return found


def given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Returns the key in `Authorization: Bearer` or `X-API-Key`, empty if there is none."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return b""
