"""Take the encoded images out of a request, within the limits of the settings."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Sequence
from typing import Any

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError, MissingImageError, RequestError, quoted
from damoyolo.formats import EncodedImage, reduce_image
from damoyolo.formats.essential import require_image_bytes


class ImageReader:
    """Reads images within the limits of `config`. `place` is where an image is in the request, for errors."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config

    def from_bytes(self, image: EncodedImage) -> EncodedImage:
        """The image, as it is.

        Raises:
            ImageTooLargeError: it has more bytes than the settings allow.
        """
        require_image_bytes(len(image), self.config)
        return image

    def from_base64(self, value: Any, place: str) -> bytes:
        """Decode strictly: the alphabet with + and /, padded; white space and line breaks are allowed.

        Raises:
            MissingImageError: the text is empty.
            ImageTooLargeError: the image has more bytes than the settings allow; it is not decoded then.
            RequestError: no text, or none of base64.
        """
        if not isinstance(value, str):
            raise RequestError(f"{place} is {quoted(value)}; a string with the image in base64 is accepted")
        start = 0
        if value[:5].lower() == "data:":
            start = value.find(",") + 1
            if not value[: max(start - 1, 0)].lower().endswith(";base64"):
                raise RequestError(
                    f"{place} is {quoted(value)}; the only accepted data URL is data:...;base64,..."
                )
        try:
            text = value[start:].encode("ascii").translate(None, b" \t\r\n")
            if not text:
                raise MissingImageError(f"{place} is empty; a string with the image in base64 is accepted")
            require_image_bytes(len(text) // 4 * 3 - text[-2:].count(b"="), self.config)
            if len(text) % 4:  # Python 3.10 accepts superfluous padding
                raise binascii.Error
            return base64.b64decode(text, validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise RequestError(
                f"{place} is {quoted(value)}; base64 is accepted: A-Z a-z 0-9 + / and = at the end"
            ) from error

    def require_count(self, count: int, place: str) -> None:
        """Refuse more images in a request than the settings allow, before any is read.

        Raises:
            RequestError: there are too many.
        """
        if count > self.config.max_instances:
            raise RequestError(
                f"{place} has {count} images; "
                f"at most {self.config.max_instances} are accepted (server setting max_instances)"
            )

    def require_pixels(self, images: Sequence[EncodedImage], place: str) -> None:
        """Refuse a request whose images have too many pixels together.

        Raises:
            ImageTooLargeError: they have more than the settings allow.
        """
        if len(images) < 2:  # one alone has a limit of its own
            return
        pixels = 0
        for image in images:
            with contextlib.suppress(RequestError):  # reported when the image is decoded
                pixels += reduce_image(image, self.config).pixels
        if pixels > self.config.max_instances_pixels:
            raise ImageTooLargeError(
                f"{place} has {len(images)} images of {pixels} pixels in all; at most "
                f"{self.config.max_instances_pixels} are accepted (server setting max_instances_pixels)"
            )
