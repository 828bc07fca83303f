"""Find or download weights: a local file, an https address, or the name of an official checkpoint."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from lib.cli import ScriptError
from lib.packaging.catalog import OFFICIAL_CHECKPOINTS

from damoyolo.errors import CheckpointError
from damoyolo.model.checkpoint import Checkpoint, load_checkpoint, load_packaged, save_packaged
from damoyolo.model.damoyolo import DamoYolo

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20


def default_cache_dir() -> Path:
    """Folder of downloaded checkpoints: $DAMOYOLO_CACHE, or the user's cache folder."""
    if os.environ.get("DAMOYOLO_CACHE"):
        return Path(os.environ["DAMOYOLO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "damoyolo"


def fetch_weights(source: str, sha256: str | None = None, cache_dir: Path | None = None) -> Path:
    """A local file with the weights that `source` names; a download is kept in the cache.

    source: path of a file, https address, or name of an official checkpoint.
    sha256: expected digest of the file, in hexadecimal; None does not check it.

    Raises:
        ScriptError: no such file, address or name; the download failed; the digest differs.
    """
    if "://" not in source and Path(source).is_file():
        path = Path(source)
        _check_sum(path, sha256, "give the digest of this file, or the file with this digest")
        return path
    url = _url_of(source)
    # Two addresses may end in the same file name.
    folder = (cache_dir or default_cache_dir()) / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (Path(urlsplit(url).path).name or "checkpoint.pth")
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            _download(url, partial)
            _check_sum(partial, sha256, f"{url} sends another file than expected")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    _check_sum(path, sha256, f"delete {path} to download it again")
    return path


def _url_of(source: str) -> str:
    if source in OFFICIAL_CHECKPOINTS:
        return OFFICIAL_CHECKPOINTS[source]
    if source.startswith("https://"):
        try:
            urlsplit(source)
        except ValueError as error:  # an unfinished IPv6 address
            raise ScriptError(f"{source} is not an address: {error}") from error
        return source
    if "://" in source:
        raise ScriptError(f"{source}: only https addresses are downloaded")
    raise ScriptError(
        f"{source} is neither a file, nor an https address, nor an official checkpoint; accepted are "
        f"{', '.join(sorted(OFFICIAL_CHECKPOINTS))}"
    )


def _download(url: str, target: Path) -> None:
    try:
        with (
            _https_session() as session,
            session.get(url, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer,
        ):
            answer.raise_for_status()
            length = int(answer.headers.get("Content-Length", 0)) or None
            with (
                target.open("wb") as file,
                tqdm(desc=target.name.split(".")[0], total=length, unit="B", unit_scale=True) as bar,
            ):
                for chunk in answer.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
                received = file.tell()
    except requests.exceptions.InvalidSchema as error:  # names the address without an adapter
        raise ScriptError(f"{url} redirects to another scheme; only https is downloaded ({error})") from error
    except (requests.RequestException, OSError) as error:
        raise ScriptError(f"{url} could not be downloaded: {error}") from error
    if length is not None and received != length:
        raise ScriptError(f"{url} sent {received} of {length} bytes; try again")


def _https_session() -> requests.Session:
    """A session that connects by https only, at every step of a chain of redirects."""
    session = requests.Session()
    del session.adapters["http://"]
    return session


def _check_sum(path: Path, expected: str | None, remedy: str) -> None:
    if expected is None:
        return
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected.lower():
        raise ScriptError(f"the SHA-256 of {path} is {found}, expected is {expected}; {remedy}")


def load_source(
    weights: Path, variant: str | None, num_classes: int, unused_class: bool = False
) -> Checkpoint:
    """The checkpoint as trained, with as many classes as there are names.

    unused_class: the file's last class channel is the unused one of older DAMO-YOLO heads, and is left out.
        Of the official files it is known which have it.

    Raises:
        CheckpointError, ConfigError: the weights cannot be read, or do not fit; fewer or more class names
            than classes.
    """
    checkpoint = load_checkpoint(weights, variant)
    if checkpoint.num_classes == num_classes and not unused_class:
        return checkpoint
    extra = checkpoint.num_classes - num_classes
    if extra == 1 and (unused_class or weights.stem in OFFICIAL_CHECKPOINTS):
        return load_checkpoint(weights, variant, num_classes)
    hint = " (or --unused-class, if the last one is the unused one of older heads)" if extra == 1 else ""
    raise CheckpointError(
        f"{weights} has {checkpoint.num_classes} classes, but {num_classes} class names are given; accepted "
        f"is one name for each class{' but the last' if unused_class else hint}: change --class-names"
    )


def folded_network(
    weights: Path, variant: str | None, num_classes: int, unused_class: bool = False
) -> DamoYolo:
    """The network that an archive built from these weights would hold: folded, on the CPU, in float32.

    Raises:
        CheckpointError, ConfigError: as `load_source`.
    """
    with tempfile.TemporaryDirectory(prefix="folded-") as folder:
        packaged = Path(folder) / "packaged.pth"
        save_packaged(packaged, load_source(weights, variant, num_classes, unused_class))
        return load_packaged(packaged)
