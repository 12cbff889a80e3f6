"""Fetches weight files once, checks their digests, and says what to do without a network.

Files lie under `weights_folder()`; those copied there by hand are found like fetched ones:
  <weights folder>/<repo, with "--" for "/">/<revision>/<file>    a file of the Hugging Face Hub
  <weights folder>/<host>/<path of the URL>                       any other file
"""

import fcntl
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from errors import UserError

TIMEOUT = 10  # seconds that a server may be silent
CHUNK = 1 << 20
ATTEMPTS = 5  # to go on with a transfer that was cut
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
_verified: set[tuple] = set()  # files that this process has hashed, as they were then


def weights_folder() -> Path:
    """Returns $ARCHCOMPARE_WEIGHTS or ~/.cache/archcompare/weights."""
    named = os.environ.get("ARCHCOMPARE_WEIGHTS")
    return Path(named or "~/.cache/archcompare/weights").expanduser()


def digest(path: Path, algorithm: str) -> str:
    """Returns the digest of a file in hexadecimal, such as `digest(path, "sha256")`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hub_file(repo: str, filename: str, revision: str, sha256: str = "") -> Path:
    """Returns a file of the Hugging Face Hub, fetched on first use.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured, an interrupted transfer goes on.

    Args:
      repo: such as "timm/resnet50.a1_in1k".
      filename: path in the repository.
      revision: a commit, so that the file never changes.
      sha256: the expected digest in hexadecimal, or "".

    Raises:
      UserError: no network, no such file, no access, a full disk, or another digest.
    """
    by_hand = weights_folder() / repo.replace("/", "--") / revision / filename
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    url = f"{endpoint}/{repo}/resolve/{revision}/{filename}"
    path = by_hand if by_hand.is_file() else _from_hub(repo, filename, revision, url, by_hand)
    _verify(path, {"sha256": sha256}, url)
    return path


def url_file(url: str, *, sha256: str = "", md5: str = "") -> Path:
    """Returns the file behind an http(s) URL, fetched on first use.

    Args:
      url: its path decides where the file lies in `weights_folder()`.
      sha256: the expected digest in hexadecimal, or "".
      md5: likewise, for publishers who state no better one.

    Raises:
      UserError: no network, no such file, a full disk, or another digest.
    """
    parts = urllib.parse.urlsplit(url)
    names = [name for name in parts.path.split("/") if name]
    if parts.scheme not in ("http", "https") or not names or ".." in names:
        raise UserError(f"weights: {url!r} is no address of a file; give an http or https URL")
    path = weights_folder().joinpath(parts.netloc.replace(":", "_"), *names)
    expected = {"sha256": sha256, "md5": md5}
    try:
        if not path.is_file():
            with _lock(path):
                if not path.is_file():  # another process was faster
                    part = path.with_name(f"{path.name}.part")
                    _fetch(url, part)
                    _verify(part, expected, url)
                    os.replace(part, path)
    except NETWORK_ERRORS as error:
        raise _unreachable(url, path, error) from error
    except OSError as error:
        raise _unwritable(error) from error
    _verify(path, expected, url)
    return path


def _from_hub(repo: str, filename: str, revision: str, url: str, by_hand: Path) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # slow, and needed only for weights that are not at hand yet
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    endpoint = url.removesuffix(f"/{repo}/resolve/{revision}/{filename}")
    wanted = {
        "repo_id": repo,
        "filename": filename,
        "revision": revision,
        "cache_dir": weights_folder() / "hub",
        "endpoint": endpoint,
        "etag_timeout": TIMEOUT,
    }
    try:
        try:
            return Path(hub.hf_hub_download(**wanted, local_files_only=True))
        except hub_errors.LocalEntryNotFoundError:
            if not hub.constants.HF_HUB_OFFLINE:
                _reach(endpoint)  # the library would try again for minutes
            return Path(hub.hf_hub_download(**wanted))
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise UserError(
            f"weights: the hub gives no access to {url}: {str(error).splitlines()[0]}\n"
            "Check the name; a private or gated repository needs a token in HF_TOKEN."
        ) from error
    except (hub_errors.LocalEntryNotFoundError, *NETWORK_ERRORS) as error:
        raise _unreachable(url, by_hand, error.__cause__ or error) from error
    except (hub_errors.HTTPError, hub_errors.HfHubHTTPError) as error:
        raise _unreachable(url, by_hand, str(error).splitlines()[0]) from error
    except OSError as error:
        raise (_unwritable(error) if error.errno else _unreachable(url, by_hand, error)) from error


def _reach(endpoint: str) -> None:
    """Raises one of NETWORK_ERRORS unless a server answers, whatever it says."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        error.close()


def _fetch(url: str, part: Path) -> None:
    """Completes `part`; a cut transfer goes on where it stopped, as long as bytes arrive."""
    for _ in range(ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer(url, part, before):
                return
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # what is there reaches beyond the end of the file
                part.unlink()
                continue
            raise
        except NETWORK_ERRORS:
            if not part.exists() or part.stat().st_size <= before:
                raise
    raise ConnectionError(f"the connection was cut {ATTEMPTS} times; {part} goes on from there")


def _transfer(url: str, part: Path, start: int) -> bool:
    """Appends the bytes from `start` on to `part`; returns whether all have arrived."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status != 206 or not resumed:
            start = 0  # the server sends the whole file
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None
        )
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch `path`; the others wait, and find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # gone with the file, however the process ends
        yield


def _verify(path: Path, expected: dict[str, str], url: str) -> None:
    """Compares digests, once a process; a damaged file is moved aside.

    Raises:
      UserError: a digest differs.
    """
    for algorithm, value in expected.items():
        facts = path.stat()
        key = (algorithm, value, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if not value or key in _verified:
            continue
        actual = digest(path, algorithm)
        if actual != value.lower():
            raise UserError(
                f"weights: {path} is not what was published: {algorithm} {value} was expected, it"
                f" has {actual}.\n{_move_aside(path)}; the next run fetches it anew from\n  {url}\n"
                "If that fails alike, the publisher's file has changed."
            )
        _verified.add(key)


def _move_aside(path: Path) -> str:
    real = path.resolve()  # the hub's cache has links to its files
    aside = real.with_name(f"{real.name}.damaged")
    try:
        os.replace(real, aside)
        path.unlink(missing_ok=True)
    except OSError:
        return "Delete that file"
    return f"It was moved to {aside}"


def _unreachable(url: str, path: Path, reason: object) -> UserError:
    return UserError(
        f"weights: cannot fetch {url}: {reason}\n"
        "If this machine has no network, fetch that URL on one that has, and put the file at\n"
        f"  {path}\nor name the file where the weights are named, as family:path."
    )


def _unwritable(error: OSError) -> UserError:
    return UserError(
        f"weights: cannot write to {weights_folder()}: {error}\n"
        "Make room there, or name another folder in ARCHCOMPARE_WEIGHTS."
    )
