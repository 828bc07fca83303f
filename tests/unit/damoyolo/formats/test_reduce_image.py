"""Files reduced to what decoding needs: the same pixels as before, without what could cost time."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from damoyolo.config import ServingConfig
from damoyolo.decode import decode_image
from damoyolo.errors import CorruptImageError, ImageTooLargeError, RequestError, UnsupportedImageError
from damoyolo.formats import reduce_image
from doubles import hostile_images as hostile
from doubles import images
from doubles.images import exif, make_pixels

CONFIG = ServingConfig()
PIXELS = make_pixels(40, 56)
IMAGE = Image.fromarray(PIXELS)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def other():
    """The image that comes second in a file."""
    return Image.new("RGB", (56, 40), (1, 2, 3))


def encode(image, image_format="PNG", **options):
    """Pillow leaves settings of the encoder on an image that it saves, so each is saved from a copy."""
    return images.encode(image.copy(), image_format, **options)


def png_text(**texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key.replace("_", " "), value, zip=len(value) > 500)
    return info


def xmp_in_png():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return info


RAW_PROFILE = f"\nexif\n      {len(exif(8))}\n{exif(8).hex()}\n"

ORDINARY = {
    "jpeg": encode(IMAGE, "JPEG"),
    "jpeg, everything": encode(
        IMAGE, "JPEG", icc_profile=PROFILE * 30, exif=exif(5), comment=b"c" * 900, dpi=(9, 9), xmp=XMP
    ),
    "jpeg, progressive": encode(IMAGE, "JPEG", progressive=True, exif=exif(3), optimize=True),
    "jpeg, orientation in xmp": encode(IMAGE, "JPEG", xmp=XMP),
    "jpeg, grey": encode(IMAGE.convert("L"), "JPEG", progressive=True),
    "jpeg, cmyk": encode(IMAGE.convert("CMYK"), "JPEG"),
    "jpeg, as rgb": encode(IMAGE, "JPEG", keep_rgb=True),
    "jpeg, restart markers": encode(IMAGE, "JPEG", restart_marker_blocks=2, progressive=True),
    "jpeg, padded markers": encode(IMAGE, "JPEG").replace(b"\xff\xc0", b"\xff\xff\xff\xc0"),
    "jpeg, something behind": encode(IMAGE, "JPEG", progressive=True) + b"\xff\xda\0\4" * 5000,
    "mpo": encode(IMAGE, "MPO", save_all=True, append_images=[other()]),
    "png": encode(IMAGE, "PNG", icc_profile=PROFILE, exif=exif(7), pnginfo=png_text(a="b" * 999)),
    "png, palette": encode(IMAGE.quantize(40), "PNG", transparency=3),
    "png, grey and alpha": encode(IMAGE.convert("LA"), "PNG"),
    "png, 16 bit": encode(PIXELS[:, :, 0].astype(np.uint16) * 257, "PNG"),
    "png, 1 bit": encode(IMAGE.convert("1"), "PNG"),
    "png, orientation in xmp": encode(IMAGE, "PNG", pnginfo=xmp_in_png()),
    "png, raw profile": encode(IMAGE, "PNG", pnginfo=png_text(Raw_profile_type_exif=RAW_PROFILE)),
    "png, animated": encode(IMAGE, "PNG", save_all=True, append_images=[other()]),
    "png, default image": encode(
        IMAGE, "PNG", save_all=True, append_images=[other(), other()], default_image=True
    ),
    "png, many data chunks": hostile.png(
        56, 40, data=zlib.compress(np.pad(PIXELS.reshape(40, -1), ((0, 0), (1, 0))).tobytes(), 0)
    ),
    "webp": encode(IMAGE, "WEBP", icc_profile=PROFILE, exif=exif(4), xmp=XMP),
    "webp, lossless": encode(IMAGE.convert("RGBA"), "WEBP", lossless=True, exact=True),
    "webp, lossy with alpha": encode(IMAGE.convert("RGBA"), "WEBP"),
    "webp, orientation in xmp": encode(IMAGE, "WEBP", xmp=XMP),
    "webp, animated": encode(IMAGE, "WEBP", save_all=True, append_images=[other()], lossless=True),
    "gif": encode(IMAGE, "GIF", comment=b"x" * 700),
    "gif, animated": encode(IMAGE, "GIF", save_all=True, append_images=[other()], loop=3),
    "gif, transparent and smaller than its screen": hostile.gif(
        9, 7, before=b"!\xf9\4\1\0\0\2\0!\xfe\3abc\0", data=b"\x02\x02\x4c\x01\0", frame=(1, 1)
    ),
    "bmp": encode(IMAGE, "BMP"),
    "bmp, palette": encode(IMAGE.quantize(200), "BMP"),
    "bmp, run lengths": hostile.bmp(4, 2, 8, 1, b"\2\1\2\x63\0\0\4\7\0\1"),
    "bmp, from top to bottom": hostile.bmp(4, -2, 8, 0, bytes(range(8))),
    "tiff": encode(IMAGE, "TIFF", icc_profile=PROFILE, exif=exif(6), description="d" * 99),
    "tiff, orientation": encode(IMAGE, "TIFF", tiffinfo={274: 5}),
    "tiff, deflate": encode(IMAGE, "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 3, 317: 2}),
    "tiff, lzw": encode(IMAGE, "TIFF", compression="tiff_lzw"),
    "tiff, jpeg": encode(IMAGE, "TIFF", compression="jpeg", quality=95),
    "tiff, fax": encode(IMAGE.convert("1"), "TIFF", compression="group4"),
    "tiff, palette": encode(IMAGE.quantize(77), "TIFF"),
    "tiff, cmyk": encode(IMAGE.convert("CMYK"), "TIFF"),
    "tiff, grey and alpha": encode(IMAGE.convert("LA"), "TIFF"),
    "tiff, big": encode(IMAGE, "TIFF", big_tiff=True),
    "tiff, big endian": encode(PIXELS[:, :, 0].astype(">u2") * 257, "TIFF"),
    "tiff, pages": encode(IMAGE, "TIFF", save_all=True, append_images=[other()]),
    "tiff, strips": hostile.tiff(
        hostile.tiff_tags(8, 6, [16, 32, 48], [16, 16, 16], 2), bytes(range(0, 144, 3))
    ),
    "tiff, tiles": hostile.tiff(
        {k: v for k, v in hostile.tiff_tags(20, 16, [], []).items() if k not in (273, 278, 279)}
        | {322: (4, [16]), 323: (4, [16]), 324: (4, [16, 272]), 325: (4, [256, 256])},
        bytes(range(256)) * 2,
    ),
}


def as_pillow_shows_it(encoded):
    """The whole file through Pillow, as it was decoded before files were reduced."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(encoded)) as opened:
        warnings.simplefilter("ignore")
        opened.load()
        transposed = ImageOps.exif_transpose(opened)
        if transposed.mode.startswith("I;16"):
            return np.repeat((np.asarray(transposed) // 257).astype(np.uint8)[:, :, None], 3, 2)
        transposed.info.pop("transparency", None)
        return np.asarray(transposed.convert("RGB"))


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_file_gives_the_pixels_that_pillow_gives_for_all_of_it(name):
    np.testing.assert_array_equal(decode_image(ORDINARY[name], CONFIG), as_pillow_shows_it(ORDINARY[name]))


@pytest.mark.parametrize("name", ORDINARY)
def test_the_size_is_known_before_decoding(name):
    reduced = reduce_image(ORDINARY[name], CONFIG)
    height, width, _ = decode_image(ORDINARY[name], CONFIG).shape
    assert set(reduced.size_wh) == {width, height}
    assert reduced.decoding_bytes >= 14 * width * height


@pytest.mark.parametrize("name", ["jpeg, everything", "png", "webp", "gif"])
def test_metadata_are_left_out(name):
    data = reduce_image(ORDINARY[name], CONFIG).data
    assert len(data) < len(ORDINARY[name])
    for mark in (b"Exif", b"ICC_PROFILE", b"iCCP", b"ICCP", b"tEXt", b"zTXt", b"xmpmeta", b"xxxx", b"cccc"):
        assert mark not in data


@pytest.mark.parametrize("name", ORDINARY)
def test_a_file_that_ends_anywhere_gives_pixels_or_an_error_of_ours(name):
    encoded = ORDINARY[name]
    for length in [*range(0, 200, 7), *range(200, len(encoded), max(1, len(encoded) // 40))]:
        with contextlib.suppress(RequestError):
            assert decode_image(encoded[:length], CONFIG).ndim == 3


# ---------------------------------------------------------------------------------------------- limits


def refusal(encoded, **settings):
    with pytest.raises(RequestError) as caught:
        reduce_image(encoded, ServingConfig(**settings))
    return caught.value


def test_scans_are_bounded_by_their_pixels():
    progressive = encode(make_pixels(64, 64), "JPEG", progressive=True)  # 10 scans
    limit = 64 * 64 * 10
    assert reduce_image(progressive, ServingConfig(max_jpeg_scan_pixels=limit)).size_wh == (64, 64)
    error = refusal(progressive, max_jpeg_scan_pixels=limit - 1)
    assert isinstance(error, ImageTooLargeError)
    assert "10 scans over 4096 pixels" in str(error)
    assert "max_jpeg_scan_pixels" in str(error)
    assert reduce_image(encode(PIXELS, "JPEG"), ServingConfig(max_jpeg_scan_pixels=1)).pixels == 40 * 56


def test_an_honest_progressive_jpeg_of_the_pixel_limit_passes():
    honest = hostile.progressive_with_scans(10, 8000, 8000)  # 20 scans in all
    assert reduce_image(honest, CONFIG).pixels == CONFIG.max_image_pixels
    assert "21 scans" in str(refusal(hostile.progressive_with_scans(11, 8000, 8000)))


def test_scans_in_arithmetic_coding_count_more():
    arithmetic = hostile.progressive_with_scans(10, 8000, 8000).replace(b"\xff\xc2", b"\xff\xca", 1)
    assert "8 times" in str(refusal(arithmetic))


def test_scans_behind_the_end_of_the_image_and_in_application_data_do_not_count():
    many = b"\xff\xda\0\4ab" * 5000
    progressive = encode(IMAGE, "JPEG", progressive=True)
    inside = progressive[:2] + hostile.segment(0xE5, many[:60000]) + progressive[2:]
    settings = ServingConfig(max_jpeg_scan_pixels=40 * 56 * 10)
    for encoded in (progressive + many, inside):
        assert reduce_image(encoded, settings).pixels == 40 * 56


@pytest.mark.parametrize(
    "encoded",
    [
        b"\xff\xd8" + hostile.segment(0xFE, b"") * 30 + encode(IMAGE, "JPEG")[2:],
        b"\xff\xd8" + b"\xff\xd0" * 30 + encode(IMAGE, "JPEG")[2:],
        b"\xff\xd8" + hostile.segment(0xDB, bytes(65) * 5) + encode(IMAGE, "JPEG")[2:],
        hostile.png(8, 8, before=hostile.chunk(b"tEXt", b"k\0v") * 30),
        hostile.png(8, 8, after=hostile.chunk(b"IDAT", b"") * 30),
        hostile.gif(1, 1, before=b"!\xfe\1x\0" * 30),
        hostile.gif(1, 1, before=b"!\xfe" + b"\1x" * 30 + b"\0"),
        hostile.webp(hostile.riff(b"junk", b"") * 30 + encode(IMAGE, "WEBP")[12:]),
        hostile.tiff(hostile.tiff_tags(8, 8, [16], [64]) | {400 + i: (3, [1]) for i in range(30)}, bytes(64)),
        hostile.tiff(hostile.tiff_tags(8, 8, [16] * 31, [8] * 31, 1), bytes(64)),
        hostile.tiff(hostile.tiff_tags(8, 40, [16], [320], 1), bytes(320)),
    ],
)
def test_the_parts_of_a_file_are_bounded(encoded):
    assert isinstance(reduce_image(encoded, CONFIG).pixels, int)
    error = refusal(encoded, max_image_parts=30)
    assert isinstance(error, ImageTooLargeError)
    assert "max_image_parts" in str(error)


@pytest.mark.parametrize(
    "encoded", [encode(np.zeros((1, 300), np.uint8)), encode(np.zeros((300, 1), np.uint8))]
)
def test_long_sides_are_refused_with_the_setting(encoded):
    assert reduce_image(encoded, ServingConfig(max_image_side=300)).pixels == 300
    error = refusal(encoded, max_image_side=299)
    assert isinstance(error, ImageTooLargeError)
    assert "max_image_side" in str(error)


def test_run_lengths_are_bounded_in_pixels_and_in_bytes():
    assert "max_rle_pixels" in str(refusal(hostile.bmp(8, 8, 8, 1, b"\0\1"), max_rle_pixels=63))
    assert "max_rle_pixels" in str(refusal(hostile.bmp(8, 8, 8, 1, b"\0\0" * 200_000), max_rle_pixels=1000))
    assert reduce_image(hostile.bmp(8, 8, 8, 0, bytes(64)), ServingConfig(max_rle_pixels=1)).pixels == 64


def test_a_canvas_of_webp_is_refused_before_it_is_allocated():
    vast = hostile.webp(
        hostile.riff(b"VP8X", bytes(4) + b"\xff\xff\0\xff\xff\0") + encode(IMAGE, "WEBP")[12:]
    )
    assert "65536 x 65536" in str(refusal(vast))


STREAM = zlib.compress(bytes(64 * 64))


@pytest.mark.parametrize(
    ("tags", "error", "mentions"),
    [
        (hostile.tiff_tags(64, 64, [16] * 64, [len(STREAM)] * 64, 1, 8), CorruptImageError, "overlap"),
        (hostile.tiff_tags(64, 64, [16] * 8, b"", 8, 8), CorruptImageError, "how long"),
        (hostile.tiff_tags(64, 64, [16], [len(STREAM)], 64, 50001), UnsupportedImageError, "WebP"),
        (hostile.tiff_tags(64, 64, [16], [len(STREAM)], 64, 8, [8] * 17), CorruptImageError, "tag 258"),
        (hostile.tiff_tags(0, 64, [16], [len(STREAM)]), UnsupportedImageError, "header is broken"),
    ],
)
def test_directories_that_no_honest_file_has_are_refused(tags, error, mentions):
    if isinstance(tags[258][1][0], list):
        tags[258] = (3, tags[258][1][0])
    found = refusal(hostile.tiff(tags, STREAM))
    assert isinstance(found, error)
    assert mentions in str(found)


def test_tiles_far_larger_than_the_image_are_refused():
    tiles = {322: (4, [9000]), 323: (4, [9000]), 324: (4, [16]), 325: (4, [len(STREAM)])}
    tags = {k: v for k, v in hostile.tiff_tags(8, 8, [], []).items() if k not in (273, 278, 279)} | tiles
    assert "max_image_pixels" in str(refusal(hostile.tiff(tags, STREAM), max_image_pixels=9000 * 4000))


def test_only_the_first_directory_and_its_known_tags_are_left_of_a_tiff():
    encoded = encode(IMAGE, "TIFF", save_all=True, append_images=[other()], exif=exif(1), icc_profile=PROFILE)
    with Image.open(io.BytesIO(reduce_image(encoded, CONFIG).data)) as opened:
        assert opened.n_frames == 1
        assert not {274, 34665, 34675, 700} & set(opened.tag_v2)


def test_a_size_that_differs_from_the_one_that_was_checked_is_refused():
    two_sizes = encode(IMAGE, "PNG")
    header = struct.pack(">IIBBBBB", 5, 5, 8, 2, 0, 0, 0)
    with pytest.raises(RequestError):
        decode_image(two_sizes[:33] + hostile.chunk(b"IHDR", header) + two_sizes[33:], CONFIG)


def test_the_memory_of_a_large_tile_counts():
    small_tiles = hostile.tiff_of_one_tile((16, 16), (16, 16))
    one_large = hostile.tiff_of_one_tile((16, 16), (8000, 16000))
    difference = (
        reduce_image(one_large, CONFIG).decoding_bytes - reduce_image(small_tiles, CONFIG).decoding_bytes
    )
    assert difference == 8 * (8000 * 16000 - 16 * 16)


def test_a_broken_extended_webp_header_is_the_clients_error():
    chunks = b"VP8X" + struct.pack("<I", 0) + encode(IMAGE, "WEBP")[12:]
    file = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    with contextlib.suppress(RequestError):
        reduce_image(file, CONFIG)


def test_an_error_of_a_format_s_reader_is_the_clients_error(monkeypatch):
    from damoyolo import formats

    def fails(*_):
        raise IndexError

    monkeypatch.setitem(formats._READERS, "PNG", (formats.png.SIGNATURES, fails))
    with pytest.raises(CorruptImageError, match="PNG"):
        reduce_image(encode(IMAGE), CONFIG)
