"""Read the encoded images and the options of a request from a row of TorchServe.

A row maps field names to a bytearray; it may also hold str or parsed JSON. The image comes

- as the raw body (field `body`) of any content type,
- as one multipart field `data`, `body` or `image`,
- as base64 in JSON, `{"image": "..."}`, with or without `data:...;base64,` before it, or
- as one of several in `{"instances": [{"b64": "..."}, ...]}`, answered by `{"predictions": [...]}`.

Options have the same name everywhere (`OPTION_NAMES`). The first place that has one takes precedence:

1. a field of the JSON document, with JSON's own types (null counts as absent),
2. a form field or query parameter beside the image, as text,
3. a request header, `X-Detect-` and the name with hyphens (`X-Detect-Score-Threshold`), as text,
4. the server's default; for `format`, the Accept header first, which asks for json, jpeg or png.

Everywhere a number is written as in JSON. JSON is read strictly: no NaN, no name twice in an object.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError, InvalidOptionError, MissingImageError, RequestError
from damoyolo.formats import EncodedImage, begins_like_image, reduce_image
from damoyolo.formats.essential import require_image_bytes
from damoyolo.response import CONTENT_TYPES, DRAWN_FORMATS, SINGLE_IMAGE_FORMATS, OutputFormat
from damoyolo.response_formats import MAX_IMAGE_ID
from damoyolo.structures import DetectionOptions

OPTION_NAMES = (
    "score_threshold",
    "iou_threshold",
    "max_detections",
    "classes",
    "class_agnostic",
    "format",
    "image_id",
)

_IMAGE_FIELDS = ("body", "data", "image")
_IGNORED_FIELDS = ("model_name",)  # part of /invocations, passed on by TorchServe
_HEADER_PREFIX = "x-detect-"
_OPTION_OF_HEADER = {_HEADER_PREFIX + name.replace("_", "-"): name for name in OPTION_NAMES}
_FORMAT_OF_CONTENT_TYPE: dict[str, OutputFormat] = {CONTENT_TYPES[name]: name for name in DRAWN_FORMATS}
_BOOL_OF_TEXT = {"true": True, "1": True, "false": False, "0": False}
_JSON_TYPE = "application/json"
_WHITE_SPACE = " \t\r\n"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MAX_TEXT = 65_536  # characters of an option; a list of a million classes takes seconds
_MAX_DIGITS = 64  # of a number; Python takes quadratic time for the digits of an int
# Values and names in a JSON document; a million of them take a second and much memory.
_MAX_JSON_ITEMS = 100_000
_ACCEPTED_FORMS = (
    "send the encoded image as the request body, as multipart field data, body or image, or as base64 in "
    'JSON: {"image": "..."} or {"instances": [{"b64": "..."}]}'
)


@dataclass(frozen=True)
class ImageRequest:
    """The content of one request.

    images: the encoded images, at least one, none of them empty.
    options: for the postprocessing, the same for all images.
    output_format: of the answer; one of SINGLE_IMAGE_FORMATS only for a single image.
    batched: the answer is `{"predictions": [...]}`, even for one image, unless its format has another form
        for several images, or none.
    image_id: of the first image in COCO results.
    """

    images: tuple[EncodedImage, ...]
    options: DetectionOptions
    output_format: OutputFormat
    batched: bool
    image_id: int = 0


class RequestParser:
    """Parses rows for a network with the classes, limits and defaults of `config`."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self._defaults = config.default_options()
        self._id_of_class = {name: class_id for class_id, name in enumerate(config.class_names)}

    def parse(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> ImageRequest:
        """Find images and options.

        Args:
            row: field name -> content.
            headers: request headers, names in any case; values other than str are ignored (TorchServe puts
                the headers of multipart fields among them).

        Raises:
            MissingImageError: no image in any accepted place.
            InvalidOptionError: an option is unknown, malformed or out of range.
            ImageTooLargeError: an image has more bytes, or several have more pixels, than the settings allow.
            RequestError: broken JSON or base64, or more images than accepted.
        """
        texts = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        field = self._image_field(row, texts)
        content = row[field]
        values = _header_options(texts) | _form_options(row, headers)
        document = _json_document(content, _content_type(headers, field, texts))
        images: tuple[EncodedImage, ...]
        if document is None:
            image = _as_image(content)
            require_image_bytes(len(image), self.config)
            images, batched = (image,), False
        else:
            values |= _document_options(document)
            images, batched = self._document_images(document)

        output_format = _output_format(values.pop("format", None), texts.get("accept", ""))
        if output_format in SINGLE_IMAGE_FORMATS and len(images) > 1:
            several = ", ".join(name for name in CONTENT_TYPES if name not in SINGLE_IMAGE_FORMATS)
            raise InvalidOptionError(
                f"format is {output_format} for {len(images)} images; {' and '.join(SINGLE_IMAGE_FORMATS)} "
                f"answer a request of one image only; accepted for several are {several}"
            )
        image_id = _image_id(values.pop("image_id", 0))
        return ImageRequest(images, self._options(values), output_format, batched, image_id)

    def _image_field(self, row: Mapping[str, Any], header_texts: Mapping[str, str]) -> str:
        found = [name for name in _IMAGE_FIELDS if name in row]
        if len(found) > 1:
            raise RequestError(
                f"the request has the image fields {' and '.join(found)}; exactly one of them is accepted"
            )
        if not found or (not isinstance(row[found[0]], Mapping) and not row[found[0]]):
            hint = ""
            if "form-urlencoded" in header_texts.get("content-type", ""):
                hint = " (its content type is a form; with curl use -T, or -H 'Content-Type: image/jpeg')"
            raise MissingImageError(f"the request has no image{hint}; {_ACCEPTED_FORMS}")
        return found[0]

    def _document_images(self, document: Mapping[str, Any]) -> tuple[tuple[EncodedImage, ...], bool]:
        if "image" in document and "instances" in document:
            raise RequestError(
                "the JSON document has both image and instances; exactly one of them is accepted"
            )
        if "image" in document:
            return (self._from_base64(document["image"], "image"),), False
        instances = document.get("instances")
        if instances is None or instances == []:
            raise MissingImageError(f"the JSON document has no image; {_ACCEPTED_FORMS}")
        if not isinstance(instances, list) or not all(
            isinstance(instance, Mapping) and set(instance) == {"b64"} for instance in instances
        ):
            raise RequestError('instances must be a list of objects {"b64": "..."} without other fields')
        if len(instances) > self.config.max_instances:
            raise RequestError(
                f"instances has {len(instances)} images; "
                f"at most {self.config.max_instances} are accepted (server setting max_instances)"
            )
        images = tuple(
            self._from_base64(instance["b64"], f"instances[{position}].b64")
            for position, instance in enumerate(instances)
        )
        if len(images) > 1:  # one alone has a limit of its own
            self._require_pixels(images)
        return images, True

    def _require_pixels(self, images: tuple[EncodedImage, ...]) -> None:
        """Refuse a request whose images have too many pixels together."""
        pixels = 0
        for image in images:
            with contextlib.suppress(RequestError):  # reported when the image is decoded
                pixels += reduce_image(image, self.config).pixels
        if pixels > self.config.max_instances_pixels:
            raise ImageTooLargeError(
                f"instances has {len(images)} images of {pixels} pixels in all; at most "
                f"{self.config.max_instances_pixels} are accepted (server setting max_instances_pixels)"
            )

    def _from_base64(self, value: Any, place: str) -> bytes:
        """Decode strictly: the alphabet with + and /, padded; white space and line breaks are allowed."""
        if not isinstance(value, str):
            raise RequestError(f"{place} is {_quoted(value)}; a string with the image in base64 is accepted")
        start = 0
        if value[:5].lower() == "data:":
            start = value.find(",") + 1
            if not value[: max(start - 1, 0)].lower().endswith(";base64"):
                raise RequestError(
                    f"{place} is {_quoted(value)}; the only accepted data URL is data:...;base64,..."
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
                f"{place} is {_quoted(value)}; base64 is accepted: A-Z a-z 0-9 + / and = at the end"
            ) from error

    def _options(self, values: Mapping[str, Any]) -> DetectionOptions:
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("score_threshold", "iou_threshold"):
                changes[name] = _number_0_to_1(name, value)
            elif name == "max_detections":
                changes[name] = self._max_detections(value)
            elif name == "class_agnostic":
                changes[name] = _parse_bool(name, value)
            else:
                changes["class_ids"] = self._class_ids(value)
        return dataclasses.replace(self._defaults, **changes)

    def _max_detections(self, value: Any) -> int:
        limit = self.config.max_detections_limit
        number = _parse_number(value) if isinstance(value, _Text) else value
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= limit:
            raise InvalidOptionError(
                f"max_detections is {_quoted(value)}; a whole number from 1 to {limit} is accepted "
                "(server setting max_detections_limit)"
            )
        return number

    def _class_ids(self, value: Any) -> tuple[int, ...]:
        _require_short("classes", value)  # a JSON string, too
        entries = (
            [entry.strip(_WHITE_SPACE) for entry in value.split(",")] if isinstance(value, str) else value
        )
        if not isinstance(entries, list) or not entries or entries == [""]:
            raise InvalidOptionError(
                f"classes is {_quoted(value)}; class names or ids are accepted, separated by commas or as a "
                "JSON list; leave it out for all classes"
            )
        return tuple(sorted({self._class_id(entry) for entry in entries}))

    def _class_id(self, entry: Any) -> int:
        """The id of a name, or an id as number or text; a name that looks like a number is a name."""
        last_id = len(self._id_of_class) - 1
        if isinstance(entry, str) and entry in self._id_of_class:
            return self._id_of_class[entry]
        class_id = _parse_number(entry) if isinstance(entry, str) else entry
        if isinstance(class_id, int) and not isinstance(class_id, bool) and 0 <= class_id <= last_id:
            return class_id
        names = list(self._id_of_class)
        known = ", ".join(map(_quoted, names[:8])) + (", ..." if len(names) > 8 else "")
        raise InvalidOptionError(
            f"classes names {_quoted(entry)}; accepted are ids from 0 to {last_id} and class names: {known}"
        )


class _Text(str):
    """An option from a place without types (form, query, header), unlike a JSON string."""

    __slots__ = ()


def _header_options(header_texts: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in header_texts.items() if name.startswith(_HEADER_PREFIX)}
    for name in found:
        if name not in _OPTION_OF_HEADER:
            raise InvalidOptionError(
                f"unknown header {_quoted(name)}; known are {', '.join(sorted(_OPTION_OF_HEADER))}"
            )
    return {_OPTION_OF_HEADER[name]: _Text(value.strip(_WHITE_SPACE)) for name, value in found.items()}


def _form_options(row: Mapping[str, Any], headers: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name not in _IMAGE_FIELDS + _IGNORED_FIELDS}
    _refuse_unknown(fields, "field")
    return {
        name: _form_value(name, value, _content_type(headers, name, {})) for name, value in fields.items()
    }


def _form_value(name: str, value: Any, content_type: str) -> Any:
    """The text of a form field, or the value of one that is JSON."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            value = bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidOptionError(f"{name} is {_quoted(value)}; UTF-8 text is accepted") from error
        if content_type.startswith(_JSON_TYPE):
            return _parse_json(value, name)
    _require_short(name, value)
    return _Text(value.strip(_WHITE_SPACE)) if isinstance(value, str) else value


def _require_short(name: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise InvalidOptionError(f"{name} has {len(value)} characters; at most {_MAX_TEXT} are accepted")


def _document_options(document: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in document.items() if name not in ("image", "instances")}
    _refuse_unknown(options, "field of the JSON document,")
    return {name: value for name, value in options.items() if value is not None}


def _refuse_unknown(fields: Mapping[str, Any], what: str) -> None:
    for name in fields:
        if name not in OPTION_NAMES:
            raise InvalidOptionError(
                f"unknown {what} {_quoted(name)}; known options are {', '.join(OPTION_NAMES)}"
            )


def asks_for_model_card(row: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    """Whether the row is TorchServe's question for a description, which comes with a header and no content.

    A client can send that header too; beside an image it has no effect.
    """
    return headers.get("describe") == "True" and not any(row.values())


def _content_type(headers: Mapping[str, Any], field: str, header_texts: Mapping[str, str]) -> str:
    """Of a multipart field; else of the request. Lower case."""
    of_field = headers.get(field)
    found = of_field.get("content-type") if isinstance(of_field, Mapping) else None
    return (found if isinstance(found, str) and found else header_texts.get("content-type", "")).lower()


def _json_document(content: Any, content_type: str) -> Mapping[str, Any] | None:
    """The JSON object in the content, or None if it is an image.

    Clients send JSON with all kinds of content types. Then the first character decides: no image format
    begins with a brace.
    """
    if isinstance(content, str | bytes | bytearray | memoryview):
        opening = content[:64].encode() if isinstance(content, str) else bytes(content[:64])
        looks_like_json = opening.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
        if not looks_like_json and (not content_type.startswith(_JSON_TYPE) or begins_like_image(opening)):
            return None
        content = _parse_json(content, "the JSON document")
    if not isinstance(content, Mapping):
        raise RequestError(
            f"the JSON document is {_quoted(content)}; an object is accepted: {_ACCEPTED_FORMS}"
        )
    return content


def _parse_json(content: str | bytes | bytearray | memoryview, what: str) -> Any:
    """Read JSON strictly and in bounded time.

    Raises:
        RequestError: says what is wrong, and never quotes the content.
    """
    try:
        text = content if isinstance(content, str) else str(content, "utf-8-sig")
        if sum(map(text.count, ",:[{")) > _MAX_JSON_ITEMS:
            raise _InvalidJsonError(f"more than {_MAX_JSON_ITEMS} values and names")
        return json.loads(
            text,
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except _InvalidJsonError as error:
        reason = str(error)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except RecursionError:
        reason = "nested too deeply"
    raise RequestError(f"{what} is not valid JSON: {reason}; {_ACCEPTED_FORMS}")


class _InvalidJsonError(Exception):
    """JSON that Python's reader would accept."""


def _unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _InvalidJsonError("an object has a name twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise _InvalidJsonError(f"{name} is no JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _InvalidJsonError(f"a number of more than {_MAX_DIGITS} digits")
    return int(digits)


def _as_image(content: Any) -> EncodedImage:
    if isinstance(content, str):
        raise RequestError(
            "the request has text where an image is expected; send the image's bytes with content "
            'type image/jpeg or application/octet-stream, or its base64 in JSON: {"image": "..."}'
        )
    image: EncodedImage = content
    return image


def _parse_number(text: str) -> int | float | None:
    """The value of a number as JSON has it, None for any other text; Python's own functions accept more."""
    if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    number: int | float = json.loads(text)
    return number


def _number_0_to_1(name: str, value: Any) -> float:
    number = _parse_number(value) if isinstance(value, _Text) else value
    # The comparison also refuses NaN.
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise InvalidOptionError(f"{name} is {_quoted(value)}; a number from 0 to 1 is accepted")
    return float(number)


def _parse_bool(name: str, value: Any) -> bool:
    truth = _BOOL_OF_TEXT.get(value.lower()) if isinstance(value, _Text) else value
    if not isinstance(truth, bool):
        raise InvalidOptionError(f"{name} is {_quoted(value)}; true or false is accepted")
    return truth


def _output_format(value: Any, accept: str) -> OutputFormat:
    if value is None:
        return _format_of_accept(accept)
    for name in CONTENT_TYPES:
        if isinstance(value, str) and value.lower() == name:
            return name
    raise InvalidOptionError(f"format is {_quoted(value)}; accepted are {', '.join(CONTENT_TYPES)}")


def _image_id(value: Any) -> int:
    number = _parse_number(value) if isinstance(value, _Text) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= MAX_IMAGE_ID:
        raise InvalidOptionError(
            f"image_id is {_quoted(value)}; a whole number from 0 to {MAX_IMAGE_ID} is accepted"
        )
    return number


def _format_of_accept(accept: str) -> OutputFormat:
    """jpeg or png if the header prefers it to all other types than images; json otherwise.

    So browsers, which list image/png beside text/html, and `*/*` get JSON. The other formats are asked for by
    name: their media types say too little.
    """
    best_format: OutputFormat = "json"
    best_quality = other_quality = 0.0
    for entry in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                quality = _parse_number(parameter[2:]) or 0.0
        if not 0 < quality <= 1:  # also NaN
            continue
        output_format = _FORMAT_OF_CONTENT_TYPE.get(media_type, "json")
        if output_format != "json" and quality > best_quality:
            best_format, best_quality = output_format, quality
        elif not media_type.startswith("image/"):
            other_quality = max(other_quality, quality)
    return best_format if best_quality > other_quality else "json"


def _quoted(value: Any) -> str:
    """What a client sent, for a message: ASCII, escaped, at most 60 characters."""
    if isinstance(value, list | Mapping):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str | bytes | bytearray | memoryview):
        value = str(value[:60]) if isinstance(value, str) else bytes(value[:60])
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
