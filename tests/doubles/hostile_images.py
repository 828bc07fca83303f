"""Small or ordinary files that cost a careless decoder much time or memory: one function per class.

`hostile_images` makes them all. Floods fill `flood_bytes`; shapes and sizes that a header promises are chosen
to pass limits of 64 million pixels where the class allows it.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

LARGE_SIDE = 7990  # 63.8 million pixels if squared


def hostile_images(flood_bytes=8 * 1024 * 1024):
    """Yield (name, bytes) of every class; names are unique and begin with the format."""
    for maker in (_jpegs, _pngs, _gifs, _webps, _bmps, _tiffs):
        yield from maker(flood_bytes)


def _fill(unit, flood_bytes):
    return unit * (flood_bytes // len(unit))


def _saved(image, image_format, **options):
    encoded = io.BytesIO()
    image.save(encoded, image_format, **options)
    return encoded.getvalue()


# ------------------------------------------------------------------------------------------------ JPEG


def segment(marker, content):
    """One JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _with_size(jpeg, width, height):
    """The same JPEG with another size in its frame header."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def progressive_with_scans(count, width=LARGE_SIDE, height=LARGE_SIDE, components=(1,), first=1, last=63):
    """A progressive JPEG with a valid first scan and then `count` scans without any data."""
    base = _with_size(_saved(Image.new("RGB", (16, 16)), "JPEG", progressive=True), width, height)
    listed = b"".join(bytes((component, 0)) for component in components)
    scan = segment(0xDA, bytes((len(components),)) + listed + bytes((first, last, 0)))
    return base[:-2] + scan * count + b"\xff\xd9"


def refinements(count, width=LARGE_SIDE, height=LARGE_SIDE):
    """A progressive JPEG with scans whose every block is visited, 27,306 blocks for 15 bits."""
    base = _with_size(_saved(Image.new("RGB", (16, 16)), "JPEG", progressive=True), width, height)
    runs = "010101010101010" * ((width // 8 + 1) * (height // 8 + 1) // 27306 + 1)
    runs += "1" * (-len(runs) % 8)
    body = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    table = segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    return base[:-2] + (table + segment(0xDA, b"\1\1\0\1\x3f\x10") + body) * count + b"\xff\xd9"


def _jpegs(flood_bytes):
    small = _saved(Image.new("RGB", (64, 64), (200, 30, 90)), "JPEG")
    start, rest = small[:2], small[2:]
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"
    yield "jpeg scans 1000", progressive_with_scans(1000)
    yield "jpeg scans 9000", progressive_with_scans(9000)
    yield (
        "jpeg scans of three components",
        progressive_with_scans(5000, components=(1, 2, 3), last=0, first=0),
    )
    yield (
        "jpeg scans with spaced markers",
        progressive_with_scans(5000).replace(b"\xff\xda", b"\xff\xff\xff\xda"),
    )
    yield "jpeg scans in a sequential file", small[:-2] + _fill(segment(0xDA, b"\1\1\0\0\x3f\0"), flood_bytes)
    yield "jpeg 10 refinements", refinements(9)
    yield "jpeg 200 refinements", refinements(200)
    restarts = segment(0xDD, b"\0\1")
    honest_scans = refinements(9)
    yield "jpeg 10 refinements, restart at every block", honest_scans[:2] + restarts + honest_scans[2:]
    long_frame = segment(0xC0, b"\x08\0\x40\0\x40\3" + bytes(60000))
    yield "jpeg of many long frames", start + _fill(long_frame, flood_bytes) + rest
    arithmetic = progressive_with_scans(10).replace(b"\xff\xc2", b"\xff\xca", 1)
    yield "jpeg scans in arithmetic coding", arithmetic
    yield "jpeg many comments", start + _fill(segment(0xFE, b""), flood_bytes) + rest
    yield "jpeg many application segments", start + _fill(segment(0xE5, b"x"), flood_bytes) + rest
    yield "jpeg many exif segments", start + _fill(segment(0xE1, exif[:6] + bytes(200)), flood_bytes) + rest
    yield "jpeg many profile parts", start + _fill(segment(0xE2, b"ICC_PROFILE\0\1\1x"), flood_bytes) + rest
    tables = segment(0xDB, (b"\0" + bytes(64)) * 1000)
    yield "jpeg many quantization tables", start + _fill(tables, flood_bytes) + rest
    yield "jpeg many huffman tables", start + _fill(segment(0xC4, b"\0" + bytes(16)), flood_bytes) + rest
    yield "jpeg many restart markers", start + _fill(b"\xff\xd0", flood_bytes) + rest
    yield "jpeg restart markers in the scan", small[:-2] + _fill(b"\xff\xd0", flood_bytes) + b"\xff\xd9"
    yield "jpeg filled with 0xff", start + _fill(b"\xff", flood_bytes) + rest
    yield "jpeg filled with junk", start + _fill(b"\x11", flood_bytes) + rest
    resources = segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000)
    yield "jpeg many photoshop resources", start + _fill(resources, flood_bytes) + rest
    many_tags = b"Exif\0\0" + exif_with_entries(5400)
    yield "jpeg exif directory", start + segment(0xE1, many_tags) + rest
    yield "jpeg exif overlapping values", start + segment(0xE1, b"Exif\0\0" + exif_overlapping(5000)) + rest
    yield "jpeg exif cycle", start + segment(0xE1, b"Exif\0\0" + exif_cycle()) + rest
    yield "jpeg huge and empty", _with_size(small, 65500, 970)
    yield (
        "jpeg of many frames",
        start + _fill(b"\xff\xc0\0\x11\x08\0\x40\0\x40\3\1\x22\0\2\x11\1\3\x11\1", flood_bytes) + rest,
    )


# ------------------------------------------------------------------------------------------------ EXIF


def exif_with_entries(count):
    """EXIF data whose directory has `count` different tags."""
    entries = b"".join(struct.pack("<HHII", tag + 300, 4, 1, tag) for tag in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


def exif_overlapping(count):
    """Every tag claims nearly the whole block as its value."""
    size = 8 + 2 + 12 * count + 4
    entries = b"".join(struct.pack("<HHII", tag + 300, 7, size - 8, 8) for tag in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


def exif_cycle():
    """The next directory is the first, and so is every sub-directory."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005, 0x014A))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 4) + entries + struct.pack("<I", 8)


# ------------------------------------------------------------------------------------------------- PNG


def chunk(kind, content):
    """One PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits=8, colour=2, interlace=0, before=b"", middle=b"", after=b"", data=None):
    """A PNG of zeros with further chunks before, between and after the image data."""
    if data is None:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        row = bytes(1 + (width * bits * channels + 7) // 8)
        pack = zlib.compressobj(9)
        per_step = max(1, 2**20 // len(row))
        steps, left = divmod(height, per_step)
        parts = [pack.compress(row * per_step) for _ in range(steps)] + [pack.compress(row * left)]
        data = b"".join(parts) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    half = len(data) // 2
    idat = chunk(b"IDAT", data[:half]) + middle + chunk(b"IDAT", data[half:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + idat + after + chunk(b"IEND", b"")


def _pngs(flood_bytes):
    bomb = zlib.compress(bytes(1_040_000), 9)
    for where in ("before", "after"):
        for kind, content in (
            (b"iCCP", b"p\0\0" + bomb),
            (b"zTXt", b"k\0\0" + bomb),
            (b"iTXt", b"k\0\1\0\0\0" + bomb),
            (b"tEXt", b"k\0v"),
            (b"tEXt", b"k\0" + bytes(900)),
            (b"eXIf", exif_with_entries(20)),
            (b"eXIf", exif_overlapping(65000)),
            (b"prVt", b""),
            (b"acTL", struct.pack(">II", 1, 0)),
            (b"sPLT", b"k\0" + bytes(900)),
        ):
            size = flood_bytes if len(content) < 2000 else flood_bytes // 4
            flood = _fill(chunk(kind, content), size) or chunk(kind, content)
            yield f"png {kind.decode()} of {len(content)} {where} the data", png(64, 64, **{where: flood})
    yield "png empty data chunks", png(64, 64, middle=_fill(chunk(b"IDAT", b""), flood_bytes))
    yield (
        "png data after the end of the pixels",
        png(64, 64, after=_fill(chunk(b"IDAT", bytes(8192)), flood_bytes)),
    )
    data = zlib.compress(bytes(64 * (1 + 64 * 3)))
    single = b"".join(chunk(b"IDAT", data[i : i + 1]) for i in range(len(data)))
    yield "png data chunks of one byte", png(64, 64, middle=b"", data=b"", after=single)
    animation = chunk(b"acTL", struct.pack(">II", 100_000, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 1, 1, 1))
    frames = b"".join(
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * i + 1, 64, 64, 0, 0, 1, 1, 1, 1))
        + chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + data)
        for i in range(min(100_000, flood_bytes // 100))
    )
    yield "png many frames", png(64, 64, before=animation + frame, after=frames)
    yield (
        "png palette of many chunks",
        png(64, 64, colour=3, before=_fill(chunk(b"PLTE", bytes(768)), flood_bytes)),
    )
    yield "png one column", png(1, 4_000_000)
    yield "png one long column", png(1, 63_999_999, bits=1, colour=0)
    yield "png one row", png(63_999_999, 1)
    yield (
        "png 16 bit interlaced",
        png(LARGE_SIDE, LARGE_SIDE, bits=16, colour=6, interlace=1, data=zlib.compress(b"")),
    )
    yield "png 16 bit bomb", png(LARGE_SIDE, LARGE_SIDE, bits=16, colour=6)
    yield "png interlaced bomb", png(LARGE_SIDE, LARGE_SIDE, bits=8, colour=2, interlace=1)
    yield "png 1 bit bomb", png(LARGE_SIDE, LARGE_SIDE, bits=1, colour=0)


# ------------------------------------------------------------------------------------------------- GIF


def gif(width, height, before=b"", data=b"\x02\x02\x4c\x01\0", flags=0x91, frame=None):
    """A GIF with further blocks before the first frame."""
    frame_width, frame_height = frame or (width, height)
    screen = struct.pack("<HHBBB", width, height, flags, 0, 0) + bytes(range(12)) * (flags >> 7)
    descriptor = b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0)
    return b"GIF89a" + screen + before + descriptor + data + b";"


def _gifs(flood_bytes):
    yield "gif many comments", gif(1, 1, _fill(b"!\xfe\1x\0", flood_bytes))
    yield "gif comment of many blocks", gif(1, 1, b"!\xfe" + _fill(b"\1x", flood_bytes) + b"\0")
    yield (
        "gif application of many blocks",
        gif(1, 1, b"!\xff\x0bNETSCAPE2.0" + _fill(b"\1x", flood_bytes) + b"\0"),
    )
    yield "gif many control extensions", gif(1, 1, _fill(b"!\xf9\4\x0c\0\0\0\0", flood_bytes))
    yield "gif bytes between blocks", gif(1, 1, bytes(flood_bytes))
    yield (
        "gif clear codes",
        gif(
            2000,
            2000,
            data=b"\x08"
            + _fill(b"\xff" + b"\0\1\2\4\x08\x10\x20\x40\x80" * 28 + b"\0\1\2", flood_bytes)
            + b"\0",
        ),
    )
    yield "gif blocks of one byte", gif(2000, 2000, data=b"\x02" + _fill(b"\1\x24", flood_bytes) + b"\0")
    frames = _fill(b",\0\0\0\0\1\0\1\0\0\2\2\x4c\1\0", flood_bytes)
    yield "gif many frames", gif(1, 1)[:-1] + frames + b";"
    yield "gif larger frame", gif(1, 1, frame=(65535, 65535))
    yield "gif canvas", gif(65535, 65535, frame=(1, 1))
    yield "gif large and empty", gif(LARGE_SIDE, LARGE_SIDE)
    yield "gif long column", gif(1, 65535)


# ------------------------------------------------------------------------------------------------ WebP


def riff(kind, content):
    """One RIFF chunk, padded to an even size."""
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) & 1)


def webp(chunks):
    """A WebP file of these chunks."""
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _extended(width, height, flags):
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return riff(b"VP8X", bytes((flags, 0, 0, 0)) + sides)


def _webps(flood_bytes):
    bitstream = _saved(Image.new("RGB", (64, 64), (9, 200, 30)), "WEBP", lossless=True)[12:]
    lossy = _saved(Image.new("RGB", (64, 64), (9, 200, 30)), "WEBP")[12:]
    frame = riff(b"ANMF", bytes(6) + b"\x3f\0\0\x3f\0\0" + bytes(4) + bitstream)
    animated = _extended(64, 64, 2) + riff(b"ANIM", bytes(6))
    yield "webp many frames", webp(animated + _fill(frame, flood_bytes))
    yield (
        "webp large canvas, small frame",
        webp(_extended(LARGE_SIDE, LARGE_SIDE, 2) + riff(b"ANIM", bytes(6)) + frame),
    )
    yield "webp vast canvas", webp(_extended(60000, 60000, 2) + riff(b"ANIM", bytes(6)) + frame)
    yield (
        "webp many unknown chunks",
        webp(_extended(64, 64, 0) + _fill(riff(b"junk", b""), flood_bytes) + lossy),
    )
    yield (
        "webp chunks after the image",
        webp(_extended(64, 64, 8) + lossy + _fill(riff(b"EXIF", b"II"), flood_bytes)),
    )
    inside = riff(
        b"ANMF",
        bytes(6) + b"\x3f\0\0\x3f\0\0" + bytes(4) + _fill(riff(b"junk", b""), flood_bytes) + bitstream,
    )
    yield "webp chunks in a frame", webp(animated + inside)
    exif = riff(b"EXIF", exif_overlapping(60000))
    yield "webp exif overlapping values", webp(_extended(64, 64, 8) + lossy + exif)
    flat = _saved(Image.new("RGB", (16383, 3900)), "WEBP", lossless=True, method=0)
    yield "webp lossless of one colour", flat
    yield "webp lossless of many code groups", _webp_code_groups()
    yield "webp column", _saved(Image.new("RGB", (1, 16383)), "WEBP", lossless=True)


class _Bits:
    """Bits of a lossless WebP, least significant first."""

    def __init__(self):
        self.bits = []

    def put(self, value, count):
        self.bits += [(value >> shift) & 1 for shift in range(count)]

    def simple_code(self, symbol):
        self.put(1, 1)  # simple
        self.put(0, 1)  # one symbol
        self.put(1, 1)  # of eight bits
        self.put(symbol, 8)

    def pack(self):
        return np.packbits(np.array(self.bits, np.uint8), bitorder="little").tobytes()


def _webp_code_groups(groups=65536, side=1024):
    """As many Huffman code groups as a lossless image can name, one per 4 x 4 pixels."""
    stream = _Bits()
    stream.put(0x2F, 8)
    stream.put(side - 1, 14)
    stream.put(side - 1, 14)
    stream.put(0, 4)  # no alpha, version 0
    stream.put(0, 1)  # no transform
    stream.put(0, 1)  # no colour cache
    stream.put(1, 1)  # several code groups
    stream.put(0, 3)  # of 4 x 4 pixels
    stream.put(0, 1)  # the image of groups: no colour cache
    for _ in range(2):  # green and red: all 256 values, 8 bits each
        _code_of_all_values(stream, 280 if _ == 0 else 256)
    for _ in range(3):
        stream.simple_code(0)
    reversed_bits = [int(f"{value:08b}"[::-1], 2) for value in range(256)]
    for index in range((side // 4) ** 2):
        group = index % groups
        stream.put(reversed_bits[group & 255], 8)
        stream.put(reversed_bits[group >> 8], 8)
    for group in range(groups):
        for _ in range(5):
            stream.simple_code(group & 31)
    return webp(riff(b"VP8L", stream.pack()))


def _code_of_all_values(stream, alphabet):
    """A code of 8 bits for each of the values 0..255 of an alphabet."""
    stream.put(0, 1)  # not simple
    stream.put(19 - 4, 4)
    order = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    for symbol in order:  # code lengths 0 and 8, one bit each
        stream.put(1 if symbol in (0, 8) else 0, 3)
    stream.put(0, 1)  # all lengths follow
    for value in range(alphabet):
        stream.put(1 if value < 256 else 0, 1)


# ------------------------------------------------------------------------------------------------- BMP


def bmp(width, height, bits, compression, data, colours=256):
    """A BMP with a palette that is not grey."""
    palette = b"".join(bytes((i, 0, 255 - i, 0)) for i in range(colours)) if bits <= 8 else b""
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    if bits < 8:
        info = info[:32] + struct.pack("<I", colours) + info[36:]
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def _bmps(flood_bytes):
    yield (
        "bmp rle4 runs",
        bmp(LARGE_SIDE, LARGE_SIDE, 4, 2, (b"\xff\x12" * 32 + b"\0\0") * LARGE_SIDE + b"\0\1", 16),
    )
    yield "bmp rle8 ends of lines", bmp(LARGE_SIDE, LARGE_SIDE, 8, 1, b"\1\1\0\0" * LARGE_SIDE + b"\0\1")
    yield "bmp rle8 runs of one", bmp(LARGE_SIDE, LARGE_SIDE, 8, 1, _fill(b"\1\1", flood_bytes))
    yield "bmp rle8 steps to nowhere", bmp(64, 64, 8, 1, _fill(b"\0\2\0\0", flood_bytes))
    yield "bmp rle8 empty lines", bmp(64, 64, 8, 1, _fill(b"\0\0", flood_bytes))
    yield (
        "bmp rle4 literal pixels",
        bmp(4000, 4000, 4, 2, _fill(b"\0\xfe" + bytes(127) + b"\0", flood_bytes), 16),
    )
    yield "bmp rle8 at the limit", bmp(2000, 2000, 8, 1, b"\1\1" * 2_000_000)
    yield "bmp rle4 at the limit", bmp(2000, 2000, 4, 2, (b"\2\x12" * 1000) * 1000 + b"\0\0" * 1000, 16)
    yield "bmp rle8 lines at the limit", bmp(2000, 2000, 8, 1, b"\1\1\0\0" * 2000)
    yield "bmp one column", bmp(1, 16_000_000, 1, 0, bytes(1000), 2)
    yield "bmp one long row", bmp(63_999_999, 1, 1, 0, bytes(8_000_000), 2)
    yield "bmp vast", bmp(2**31 - 1, 2**31 - 1, 24, 0, b"")
    yield (
        "bmp palette",
        bmp(64, 64, 8, 0, bytes(4096), 256)[:46] + struct.pack("<I", 65536) + bytes(flood_bytes // 8),
    )


# ------------------------------------------------------------------------------------------------ TIFF


def tiff(tags, extra=b"", big=False):
    """A TIFF of one directory: tags maps number -> (type, values or raw bytes); data begin at byte 16."""
    sizes = {1: "B", 2: "B", 3: "H", 4: "I", 5: "Q", 7: "B", 16: "Q"}
    head = 16
    out_of_line, entries = b"", b""
    place = head + len(extra)
    inline, count_format = (8, "Q") if big else (4, "I")
    for number in sorted(tags):
        kind, values = tags[number]
        raw = values if isinstance(values, bytes) else np.array(values, "<" + sizes[kind]).tobytes()
        count = len(raw) // struct.calcsize(sizes[kind])
        if len(raw) <= inline:
            value = raw.ljust(inline, b"\0")
        else:
            value = struct.pack("<" + count_format, place + len(out_of_line))
            out_of_line += raw + bytes(len(raw) & 1)
        entries += struct.pack("<HH" + count_format, number, kind, count) + value
    first = place + len(out_of_line)
    count = struct.pack("<Q" if big else "<H", len(tags))
    start = (
        b"II+\0\x08\0\0\0" + struct.pack("<Q", first)
        if big
        else b"II*\0" + struct.pack("<I", first) + bytes(8)
    )
    return start + extra + out_of_line + count + entries + bytes(inline)


def tiff_tags(width, height, offsets, counts, rows=None, compression=1, bits=8, photometric=1, **more):
    """The tags of a grey image in strips."""
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits]),
        259: (3, [compression]),
        262: (3, [photometric]),
        273: (4, offsets),
        277: (3, [1]),
        278: (4, [rows or height]),
        279: (4, counts),
    }
    return tags | {int(name[1:]): value for name, value in more.items()}


def tiff_of_one_tile(size_wh, tile_wh):
    """A grey, deflated TIFF whose one tile may be much larger than the image."""
    data = zlib.compress(bytes(tile_wh[0] * tile_wh[1]), 9)
    tags = tiff_tags(*size_wh, [16], [len(data)], compression=8)
    tags = {number: value for number, value in tags.items() if number not in (273, 278, 279)}
    sides = {322: (4, [tile_wh[0]]), 323: (4, [tile_wh[1]])}
    return tiff(tags | sides | {324: (4, [16]), 325: (4, [len(data)])}, data)


def _tiffs(flood_bytes):
    yield "tiff of one tile larger than the image", tiff_of_one_tile((16, 16), (8000, 16000))
    data = bytes(64 * 64)
    plain = tiff_tags(64, 64, [16], [4096])
    many = {0xBC02 + i: (4, [i]) for i in range(17000)}
    yield "tiff many tags", tiff(plain | many, data)
    overlapping = tiff(
        plain | {0x9000 + i: (7, bytes(8)) for i in range(8000)}, data + bytes(flood_bytes // 8)
    )
    yield "tiff overlapping values", _claim(overlapping, 0x9000, flood_bytes // 8)
    yield "tiff big with many tags", tiff(plain | many, data, big=True)
    yield "tiff many rationals", tiff(plain | {282: (5, bytes(flood_bytes))}, data)
    yield "tiff many bits per sample", tiff(plain | {258: (3, bytes(flood_bytes))}, data)
    yield "tiff long colour map", tiff(plain | {262: (3, [3]), 320: (3, bytes(flood_bytes))}, data)
    count = flood_bytes // 8
    yield "tiff many strips", tiff(tiff_tags(64, count, [16] * count, [64] * count, 1), data)
    yield "tiff strips beyond the image", tiff(tiff_tags(64, 64, [16] * count, [64] * count, 1), data)
    tiles = {322: (4, [1]), 323: (4, [1]), 324: (4, [16] * count), 325: (4, [1] * count)}
    small_tiles = {
        k: v for k, v in tiff_tags(1000, count // 1000, [], []).items() if k not in (273, 278, 279)
    }
    yield "tiff tiles of one pixel", tiff(small_tiles | tiles, data)
    stream = zlib.compress(bytes(2**20), 9) + bytes(flood_bytes)
    reversed_strips = tiff_tags(64, 4000, [16] * 4000, [len(stream)] * 4000, 1, 8, f266=(3, [2]))
    yield "tiff shared strips in reverse bit order", tiff(reversed_strips, stream)
    missing = {k: v for k, v in reversed_strips.items() if k != 279}
    yield "tiff strips without sizes", tiff(missing, stream)
    huge = {322: (4, [30000]), 323: (4, [30000]), 324: (4, [16]), 325: (4, [len(stream)])}
    one = {k: v for k, v in tiff_tags(8, 8, [], [], compression=8).items() if k not in (273, 278, 279)}
    yield "tiff one huge tile", tiff(one | huge, stream)
    yield (
        "tiff deflate of large rows",
        tiff(tiff_tags(LARGE_SIDE, LARGE_SIDE, [16], [len(stream)], compression=8), stream),
    )
    fax = bytes(flood_bytes // 4)
    yield "tiff bad fax rows", tiff(tiff_tags(64, 60000, [16], [len(fax)], compression=3, bits=1), fax)
    yield "tiff bad group 4", tiff(tiff_tags(64, 60000, [16], [len(fax)], compression=4, bits=1), fax)
    lzw = b"\x80" * 4096
    yield "tiff lzw of many strips", tiff(tiff_tags(64, 60000, [16] * 60000, [4096] * 60000, 1, 5), lzw)
    scans = progressive_with_scans(3000, components=(1,)) + b""
    grey = _with_size(_saved(Image.new("L", (16, 16)), "JPEG", progressive=True), LARGE_SIDE, LARGE_SIDE)
    scans = grey[:-2] + segment(0xDA, b"\1\1\0\1\x3f\0") * 3000 + b"\xff\xd9"
    yield "tiff jpeg scans", tiff(tiff_tags(LARGE_SIDE, LARGE_SIDE, [16], [len(scans)], compression=7), scans)
    scans = grey[:-2] + segment(0xDA, b"\1\1\0\1\x3f\0") * 90 + b"\xff\xd9"
    yield (
        "tiff jpeg 90 scans",
        tiff(tiff_tags(LARGE_SIDE, LARGE_SIDE, [16], [len(scans)], compression=7), scans),
    )
    first = tiff(plain, data)
    at = struct.unpack("<I", first[4:8])[0]
    yield "tiff directory that follows itself", first[:-4] + struct.pack("<I", at)
    pages = _saved(
        Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))] * 500
    )
    yield "tiff many pages", pages
    yield "tiff one column", tiff(tiff_tags(1, 8_000_000, [16], [1_000_000], bits=1), bytes(1_000_000))
    yield "tiff many samples", tiff(plain | {277: (3, [65535]), 258: (3, [8] * 65535)}, data)
    yield "tiff vast", tiff(tiff_tags(2**32 - 1, 2**32 - 1, [16], [4096]), data)
    packed = b"\x81\0" * (flood_bytes // 2)
    yield (
        "tiff packbits",
        tiff(tiff_tags(LARGE_SIDE, LARGE_SIDE, [16], [len(packed)], compression=32773), packed),
    )
    jpeg = _saved(Image.new("L", (64, 8)), "JPEG")
    strips = 60000
    for name, compression, stream in (
        ("lzma", 34925, _xz(64)),
        ("deflate", 8, zlib.compress(bytes(64))),
        ("raw", 1, bytes(64)),
        ("packbits", 32773, b"\xc1\0"),
        ("fax", 4, b"\0\x10\1\0\x10\1"),
        ("jpeg", 7, jpeg),
        ("old jpeg", 6, jpeg),
    ):
        height = strips * (8 if "jpeg" in name else 1)
        bits = 1 if name == "fax" else 8
        sizes = [len(stream)] * strips
        where = [16 + len(stream) * i for i in range(strips)]
        tags = tiff_tags(64, min(height, 65535), where, sizes, height // strips, compression, bits)
        yield f"tiff {name} of many strips", tiff(tags, stream * strips)
        tiles = {k: v for k, v in tags.items() if k not in (273, 278, 279)} | {
            256: (4, [4096]),
            257: (4, [height // strips * strips // 64]),
            322: (4, [64]),
            323: (4, [height // strips]),
            324: (4, where),
            325: (4, sizes),
        }
        yield f"tiff {name} of many tiles", tiff(tiles, stream * strips)
    xz = _xz(2**26)
    yield "tiff lzma", tiff(tiff_tags(8000, 8000, [16], [len(xz)], compression=34925), xz)


def _xz(size):
    import lzma

    return lzma.compress(bytes(size), preset=9)


def _claim(encoded, first_tag, size):
    """Let every tag from `first_tag` on claim `size` bytes from byte 16 on."""
    (at,) = struct.unpack("<I", encoded[4:8])
    (entries,) = struct.unpack("<H", encoded[at : at + 2])
    table = bytearray(encoded[at + 2 : at + 2 + 12 * entries])
    for position in range(0, len(table), 12):
        if struct.unpack_from("<H", table, position)[0] >= first_tag:
            struct.pack_into("<II", table, position + 4, size, 16)
    return encoded[: at + 2] + bytes(table) + encoded[at + 2 + 12 * entries :]
