"""Images to send: encoded bytes, files, addresses and arrays; and finding them by what a command is given."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin, urlsplit

from damoyolo_client.errors import ClientError
from damoyolo_client.threads import DaemonThreads

if TYPE_CHECKING:
    import numpy as np
    import requests
    from numpy.typing import NDArray

    # Encoded bytes; a file; the path of a file or an http(s) address; (H, W, 3) RGB or (H, W) grey.
    Image = bytes | Path | str | NDArray[np.uint8]

# What a folder is searched for; a file named on the command line is sent whatever it is called.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
STDIN = "-"
MAX_DOWNLOAD_BYTES = 34_000_000  # max_request_size of config.properties: the server takes no more
DOWNLOAD_S = 60.0  # with all redirects
MAX_REDIRECTS = 5
SILENCE_S = 10.0  # of a site, while connecting and between any two pieces
CHUNK_BYTES = 2**18


class Source(NamedTuple):
    """An image and how the user named it."""

    name: str
    image: Image

    def file_name(self) -> str:
        """The last part of a path or an address."""
        if self.name == STDIN:
            return "stdin"
        path = urlsplit(self.name).path if is_address(self.name) else self.name
        return Path(path).name or "image"


def is_address(text: str) -> bool:
    """Whether it is an address to download from."""
    return text.lower().startswith(("http://", "https://"))


def encoded(image: Image) -> bytes:
    """The image as the bytes of a file.

    Raises:
        ClientError: it cannot be downloaded or encoded.
        OSError: it cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str) and is_address(image):
        return download(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    return _encode_array(image)


def _encode_array(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image as PillowImage

    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    dtype = str(getattr(pixels, "dtype", type(pixels).__name__))
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if dtype != "uint8" or not is_image or 0 in shape:
        raise ClientError(
            f"an image is {dtype} of shape {tuple(shape)}; accepted are uint8 arrays of (height, width, 3) "
            "RGB or (height, width), paths, addresses, and the bytes of an image file"
        )
    stream = io.BytesIO()
    PillowImage.fromarray(pixels).save(stream, "PNG", compress_level=1)  # without loss
    return stream.getvalue()


def download(address: str) -> bytes:
    """What an address answers, of at most MAX_DOWNLOAD_BYTES and within DOWNLOAD_S seconds.

    Follows up to MAX_REDIRECTS redirects. Proxies of the environment and passwords in ~/.netrc are not used.

    Raises:
        ClientError: it answers something else, too much, too slowly, or nothing.
    """
    # A thread that can be abandoned: no time limit of a socket ends header lines that arrive byte by byte, or
    # the look-up of a name.
    with DaemonThreads(1) as threads:
        downloaded = threads.submit(functools.partial(_download, address, time.monotonic() + DOWNLOAD_S))
        try:
            return downloaded.result(DOWNLOAD_S)
        except futures.TimeoutError:
            raise ClientError(f"{address} takes longer than {DOWNLOAD_S:g} s") from None


def _download(address: str, deadline_s: float) -> bytes:
    """deadline_s: on the clock of time.monotonic."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError

    target = address
    try:
        # The adapter alone: a session reads the bodies of redirects to their end, even if it does not follow.
        with contextlib.closing(HTTPAdapter()) as adapter:
            for _ in range(MAX_REDIRECTS + 1):
                request = requests.Request("GET", target).prepare()
                with contextlib.closing(adapter.send(request, stream=True, timeout=SILENCE_S)) as response:
                    if response.status_code == 200:
                        return _bounded_body(response, address, deadline_s)
                    if not response.is_redirect:
                        raise ClientError(
                            f"{address} answers {response.status_code} {response.reason}".rstrip()
                        )
                    target = _redirect_target(target, response.headers["Location"])
    except (requests.RequestException, HTTPError, ValueError) as error:  # ValueError: of odd addresses
        cause = error.args[0] if error.args else error
        raise ClientError(f"cannot download {address}: {getattr(cause, 'reason', cause)}") from error
    raise ClientError(f"cannot download {address}: more than {MAX_REDIRECTS} redirects")


def _redirect_target(address: str, location: str) -> str:
    """Where a Location header leads to.

    Raises:
        ValueError: to something else than HTTP, or from https to http, where others can read along.
    """
    target = urljoin(address, location)
    if not is_address(target) or (urlsplit(address).scheme, urlsplit(target).scheme) == ("https", "http"):
        raise ValueError(f"a redirect leads to {target}, which is not followed")
    return target


def _bounded_body(response: requests.Response, address: str, deadline_s: float) -> bytes:
    data = bytearray()
    # read1 returns what is there; a read of a fixed size could wait for as long as bytes trickle in.
    while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
        data += chunk
        if len(data) > MAX_DOWNLOAD_BYTES:
            raise ClientError(
                f"{address} answers more than {MAX_DOWNLOAD_BYTES:,} bytes, the most that is sent"
            )
        if time.monotonic() > deadline_s:
            raise ClientError(f"{address} takes longer than {DOWNLOAD_S:g} s")
    return bytes(data)


def find_sources(named: Sequence[str], recursive: bool) -> list[Source]:
    """The images that the user named: files, folders, patterns, addresses, and `-` for standard input.

    Raises:
        ClientError: one of them names no image.
    """
    if Counter(named)[STDIN] > 1:
        raise ClientError(f"{STDIN} is given twice; standard input is one image")
    found: list[Source] = []
    for text in named:
        if text == STDIN:
            found.append(Source(text, _read_stdin()))
        elif is_address(text):
            found.append(Source(text, text))
        else:
            found += [Source(str(path), path) for path in find_images(_expand(text), recursive)]
    return found


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        raise ClientError(f"{STDIN} is standard input, which is a terminal; send an image into it")
    data = sys.stdin.buffer.read(MAX_DOWNLOAD_BYTES + 1)
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ClientError(
            f"{STDIN} is standard input with more than {MAX_DOWNLOAD_BYTES:,} bytes, the most that is sent"
        )
    if not data:
        raise ClientError(f"{STDIN} is standard input, which is empty")
    return data


def _expand(text: str) -> list[Path]:
    """The paths that a pattern matches, for shells that leave that to the command, and for quoted ones."""
    if os.path.lexists(text) or not any(character in text for character in "*?["):
        return [Path(text)]
    matches = sorted(glob.glob(text, recursive=True))
    if not matches:
        raise ClientError(f"{text} matches no file")
    files = [match for match in matches if os.path.isfile(match)]  # ** matches folders, too
    return list(map(Path, files or matches))


def require_file(path: Path) -> Path:
    """`path`, which has to be a regular file: a device or a pipe may never end.

    Raises:
        ClientError: it is none.
    """
    if not path.exists():
        raise ClientError(f"{path} does not exist")
    if not path.is_file():
        raise ClientError(f"{path} is not a regular file")
    return path


def find_images(paths: Sequence[Path], recursive: bool) -> list[Path]:
    """The files among `paths`, and the images of its folders in alphabetical order.

    Raises:
        ClientError: a path does not exist or is no regular file, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(require_file(path))
            continue
        entries = path.rglob("*") if recursive else path.iterdir()
        images = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not images:
            hint = "" if recursive else "; --recursive searches its sub-folders too"
            raise ClientError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}){hint}")
        found.extend(images)
    return found
