"""Files to throw at a server: images of every format, whole and damaged, and files that are no images.

python tests/doubles/corpus.py FOLDER COUNT
"""

import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SEEDS_DIR = Path(__file__).resolve().parents[1] / "data" / "smears"
IMAGE_KINDS = {
    "jpeg": ("JPEG", {}),
    "jpeg-progressive": ("JPEG", {"progressive": True}),
    "jpeg-444": ("JPEG", {"subsampling": 0}),
    "png": ("PNG", {}),
    "png-palette": ("PNG", {}),
    "webp": ("WEBP", {}),
    "webp-lossless": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "gif": ("GIF", {}),
}


def seed_images(random):
    """An encoded image of each kind and its name, of random size up to 160 pixels a side."""
    source = Image.open(SEEDS_DIR / "smear_3.jpg").convert("RGB")
    for kind, (image_format, options) in IMAGE_KINDS.items():
        image = source.resize(tuple(int(side) for side in random.integers(1, 160, 2)))
        if kind == "png-palette":
            image = image.convert("P")
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(1, 9))  # libtiff refuses to write others
        stream = io.BytesIO()
        if image_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            options = {**options, "exif": exif}
        image.save(stream, image_format, **options)
        yield kind, stream.getvalue()


def whole(content, random):
    return content


def bits_flipped(content, random):
    data = bytearray(content)
    for position in random.integers(0, len(data), int(random.integers(1, 30))):
        data[position] ^= 1 << int(random.integers(0, 8))
    return bytes(data)


def header_changed(content, random):
    """Random values in the first 64 bytes after the signature."""
    data = bytearray(content)
    for position in random.integers(4, min(64, len(data)), 4):
        data[position] = int(random.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF]))
    return bytes(data)


def truncated(content, random):
    return content[: int(random.integers(1, len(content)))]


def part_repeated(content, random):
    start, end = sorted(int(position) for position in random.integers(0, len(content), 2))
    return content[:end] + content[start:end] * int(random.integers(1, 50)) + content[end:]


def part_removed(content, random):
    start, end = sorted(int(position) for position in random.integers(0, len(content), 2))
    return content[:start] + content[end:]


def zeros_inserted(content, random):
    position = int(random.integers(0, len(content)))
    return content[:position] + bytes(int(random.integers(1, 5000))) + content[position:]


def png_checksums_repaired(content, random):
    """A changed chunk whose checksum fits, so that decoders look inside."""
    if not content.startswith(b"\x89PNG"):
        return bits_flipped(content, random)
    data, position = bytearray(content), 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if length and random.random() < 0.5:
            data[position + 8 + int(random.integers(0, length))] ^= 0xFF
        checksum = zlib.crc32(data[position + 4 : position + 8 + length])
        data[position + 8 + length : position + 12 + length] = checksum.to_bytes(4, "big")
        position += 12 + length
    return bytes(data)


MUTATIONS = (
    whole,
    bits_flipped,
    header_changed,
    truncated,
    part_repeated,
    part_removed,
    zeros_inserted,
    png_checksums_repaired,
)


def other_files(random):
    """Files that are no images, with their names."""
    noise = random.bytes(int(random.integers(0, 4000)))
    yield "empty", b""
    yield "noise", noise
    yield "text", "Blutkörperchen ".encode() * int(random.integers(1, 100))
    yield "html", b"<html><script>alert(1)</script></html>"
    yield "pdf", b"%PDF-1.7\n" + noise
    yield "zip", b"PK\x03\x04" + noise
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "form", b"a=1&" * int(random.integers(1, 2000))
    yield "json", json.dumps({"image": noise.hex(), "score_threshold": [float("nan")]}).encode()
    yield "json-deep", b'{"image":' + b"[" * int(random.integers(1, 20_000))
    yield "json-wrong", json.dumps({"instances": [{"b64": "AAAA"}, {"b64": None}, 3, []]}).encode()
    for signature in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"BM",
        b"II*\0",
        b"MM\0*",
    ):
        yield "signature-only", signature + noise


def write_corpus(folder, count, seed=0):
    """Write `count` files into folders by kind; equal seeds give equal files."""
    random = np.random.default_rng(seed)
    written = 0
    while written < count:
        mutation = MUTATIONS[int(random.integers(0, len(MUTATIONS)))]
        batch = [
            (kind, mutation(data, random), f"{mutation.__name__}.{IMAGE_KINDS[kind][0].lower()}")
            for kind, data in seed_images(random)
        ]
        batch += [(kind, data, "bin") for kind, data in other_files(random)]
        for kind, data, ending in batch[: count - written]:
            path = folder / kind / f"{written:05}_{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written += 1


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]), int(sys.argv[2]))
