"""Small images, as arrays and as files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def make_pixels(height, width, seed=0):
    """(h, w, 3) uint8: smooth colours that no flip or rotation maps onto themselves."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / max(width - 1, 1)
    green = 255 * rows / max(height - 1, 1)
    blue = (red + 2 * green + 40 * seed) / 4
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def encode(image, image_format="PNG", **options):
    """An image as a file's bytes; options are those of `Image.save`."""
    encoded = io.BytesIO()
    as_image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    as_image.save(encoded, image_format, **options)
    return encoded.getvalue()


def encode_jpeg(image, **options):
    """An image as a JPEG file's bytes."""
    return encode(image, "JPEG", **options)


def exif(orientation, byte_order=">"):
    """EXIF data whose main directory holds two entries, the second of them the orientation."""
    head = b"MM\0*" if byte_order == ">" else b"II*\0"
    make = struct.pack(byte_order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    tag = struct.pack(byte_order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    directory = struct.pack(byte_order + "IH", 8, 2) + make + tag + bytes(4)
    return b"Exif\0\0" + head + directory


def png_of_header_only(width, height):
    """A 1-bit PNG that promises a size and holds no pixels."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
