"""Where the weights come from: a local file, an https address, or the name of an official checkpoint."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from lib.packaging.catalog import OFFICIAL_CHECKPOINTS

from damoyolo.model.checkpoint import load_checkpoint, load_packaged, save_packaged
from damoyolo.model.damoyolo import DamoYolo

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20


class WeightsError(Exception):
    """The weights cannot be had, or are not the ones meant."""


def default_cache_dir() -> Path:
    """Folder of downloaded checkpoints: $DAMOYOLO_CACHE, or the user's cache folder."""
    if os.environ.get("DAMOYOLO_CACHE"):
        return Path(os.environ["DAMOYOLO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "damoyolo"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_weights(source: str, sha256: str | None = None, cache_dir: Path | None = None) -> Path:
    """A local file that holds the weights which `source` names.

    source: path of a file, https address, or name of an official checkpoint.
    sha256: what the file has to have, in hexadecimal; not checked if None.

    Raises:
        WeightsError: no such file, address or name; the download failed; the sum differs.
    """
    if "://" not in source and Path(source).is_file():
        path = Path(source)
        _check_sum(path, sha256, "give the right sum, or the file that it belongs to")
        return path
    url = _url_of(source)
    # The address is part of the name: two addresses may end alike.
    folder = (cache_dir or default_cache_dir()) / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (Path(urlsplit(url).path).name or "checkpoint.pth")
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            _download(url, partial)
            _check_sum(partial, sha256, f"what {url} sends is not what was expected")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    _check_sum(path, sha256, f"delete {path} to download it again")
    return path


def _url_of(source: str) -> str:
    official = OFFICIAL_CHECKPOINTS.get(source)
    if official is not None:
        return official.url
    if source.startswith("https://"):
        return source
    if "://" in source:
        raise WeightsError(f"{source}: only https addresses are downloaded")
    raise WeightsError(
        f"{source} is neither a file, nor an https address, nor an official checkpoint; those are "
        f"{', '.join(sorted(OFFICIAL_CHECKPOINTS))}"
    )


def _download(url: str, target: Path) -> None:
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer:
            answer.raise_for_status()
            if urlsplit(answer.url).scheme != "https":
                raise WeightsError(f"{url} leads to {answer.url}; only https is downloaded")
            length = int(answer.headers.get("Content-Length", 0)) or None
            with (
                target.open("wb") as file,
                tqdm(desc=target.name.split(".")[0], total=length, unit="B", unit_scale=True) as bar,
            ):
                for chunk in answer.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
                received = file.tell()
    except (requests.RequestException, OSError) as error:
        raise WeightsError(f"{url} could not be downloaded: {error}") from error
    if length is not None and received != length:
        raise WeightsError(f"{url} sent {received} of {length} bytes; try again")


def _check_sum(path: Path, expected: str | None, remedy: str) -> None:
    if expected is None:
        return
    found = sha256_of(path)
    if found != expected.lower():
        raise WeightsError(f"SHA-256 of {path} is {found}, expected is {expected}; {remedy}")


def folded_network(weights: Path, variant: str | None, num_classes: int) -> DamoYolo:
    """The network that an archive of these weights, as trained, would hold.

    Raises:
        CheckpointError, ConfigError: they cannot be read, or do not fit.
    """
    with tempfile.TemporaryDirectory(prefix="folded-") as folder:
        packaged = Path(folder) / "packaged.pth"
        save_packaged(packaged, load_checkpoint(weights, variant, num_classes))
        return load_packaged(packaged)
