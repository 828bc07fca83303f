"""Read the encoded images and the options of a request from a row of TorchServe.

A row maps field names to a bytearray; it may also hold str or parsed JSON. The image comes

- as the raw body (field `body`) of any content type,
- as one multipart field `data`, `body` or `image`,
- as base64 in JSON, `{"image": "..."}` or `{"data": "..."}`, with or without `data:...;base64,` before it,
- as one of several in `{"instances": [{"b64": "..."}, ...]}`, answered by `{"predictions": [...]}`, or
- in a tensor of the Open Inference Protocol (`inference_request.py`).

In JSON `{"b64": "..."}` may stand for the text (KServe v1), and an instance may have it in `image` or `data`.

Options have the same name everywhere (`OPTION_NAMES`). The first place that has one takes precedence:

1. a field of the JSON document, with JSON's own types (null counts as absent),
2. a form field or query parameter beside the image, as text,
3. a request header, `X-Detect-` and the name with hyphens (`X-Detect-Score-Threshold`), as text,
4. the server's default; for `format`, the Accept header first, which asks for json, jpeg or png.

Everywhere a number is written as in JSON. JSON is read strictly: no NaN, no name twice in an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from damoyolo.config import ServingConfig
from damoyolo.errors import InvalidOptionError, MissingImageError, RequestError, quoted
from damoyolo.formats import EncodedImage, begins_like_image
from damoyolo.inference_answer import TensorRequest
from damoyolo.inference_request import ADDRESS_HEADER, LENGTH_HEADER, InferenceContent, InferenceReader
from damoyolo.option_values import (
    DETECTION_OPTIONS,
    WHITE_SPACE,
    OptionReader,
    Text,
    require_short,
    whole_number,
)
from damoyolo.request_images import ImageReader
from damoyolo.response import CONTENT_TYPES, DRAWN_FORMATS, SINGLE_IMAGE_FORMATS, OutputFormat
from damoyolo.response_formats import MAX_IMAGE_ID
from damoyolo.strict_json import parse_json, parse_number
from damoyolo.structures import DetectionOptions

OPTION_NAMES = (*DETECTION_OPTIONS, "format", "image_id")

_IMAGE_FIELDS = ("body", "data", "image")
_IGNORED_FIELDS = ("model_name",)  # part of /invocations, passed on by TorchServe
_HEADER_PREFIX = "x-detect-"
_OPTION_OF_HEADER = {_HEADER_PREFIX + name.replace("_", "-"): name for name in OPTION_NAMES}
_FORMAT_OF_CONTENT_TYPE: dict[str, OutputFormat] = {CONTENT_TYPES[name]: name for name in DRAWN_FORMATS}
_JSON_TYPE = "application/json"
_SINGLE_IMAGE = ("image", "data")  # fields of a document or of an instance
_CONTENT_FIELDS = (*_SINGLE_IMAGE, "instances")
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
    tensors: not None if the answer is one of the Open Inference Protocol; then `batched` is true.
    """

    images: tuple[EncodedImage, ...]
    options: DetectionOptions
    output_format: OutputFormat
    batched: bool
    image_id: int = 0
    tensors: TensorRequest | None = None

    def place(self, index: int) -> str:
        """Where an image is in a request of several, for errors."""
        return f"inputs[0].data[{index}]" if self.tensors else f"instances[{index}]"


class RequestParser:
    """Parses rows for a network with the classes, limits and defaults of `config`."""

    def __init__(self, config: ServingConfig) -> None:
        self._images = ImageReader(config)
        self._inference = InferenceReader(self._images)
        self._options = OptionReader(config).read

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
        if ADDRESS_HEADER in texts or LENGTH_HEADER in texts:
            return self._tensor_request(self._inference.read(row, texts), _header_options(texts))
        field = self._image_field(row, texts)
        content = row[field]
        values = _header_options(texts) | _form_options(row, headers)
        document = _json_document(content, _content_type(headers, field, texts))
        images: tuple[EncodedImage, ...]
        if document is None:
            images, batched = (self._images.from_bytes(_as_image(content)),), False
        elif "inputs" in document:
            return self._tensor_request(self._inference.read_document(document), values)
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
        image_id = whole_number("image_id", values.pop("image_id", 0), 0, MAX_IMAGE_ID)
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

    def _tensor_request(self, content: InferenceContent, values: Mapping[str, Any]) -> ImageRequest:
        values = {**values, **content.values}
        for name in values:
            if name not in DETECTION_OPTIONS:
                raise InvalidOptionError(
                    f"{name} has no meaning in the Open Inference Protocol, whose answers are tensors; "
                    f"accepted are {', '.join(DETECTION_OPTIONS)}"
                )
        options = self._options(values)
        return ImageRequest(content.images, options, "json", batched=True, tensors=content.tensors)

    def _document_images(self, document: Mapping[str, Any]) -> tuple[tuple[EncodedImage, ...], bool]:
        found = [name for name in _CONTENT_FIELDS if name in document]
        if len(found) > 1:
            raise RequestError(
                f"the JSON document has both {' and '.join(found)}; exactly one of them is accepted"
            )
        if found and found[0] in _SINGLE_IMAGE:
            return (self._image(document[found[0]], found[0]),), False
        instances = document.get("instances")
        if instances is None or instances == []:
            raise MissingImageError(f"the JSON document has no image; {_ACCEPTED_FORMS}")
        if not isinstance(instances, list) or not all(map(_is_instance, instances)):
            raise RequestError(
                'instances must be a list of objects {"b64": "..."} without other fields; image or data may '
                "stand for b64"
            )
        self._images.require_count(len(instances), "instances")
        images = tuple(
            self._image(instance.get("image", instance.get("data", instance)), f"instances[{position}]")
            for position, instance in enumerate(instances)
        )
        self._images.require_pixels(images, "instances")
        return images, True

    def _image(self, value: Any, place: str) -> EncodedImage:
        """An image as base64 or as {"b64": base64}."""
        if isinstance(value, Mapping) and set(value) == {"b64"}:
            return self._images.from_base64(value["b64"], f"{place}.b64")
        return self._images.from_base64(value, place)


def _is_instance(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("b64", *_SINGLE_IMAGE)


def _header_options(header_texts: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in header_texts.items() if name.startswith(_HEADER_PREFIX)}
    for name in found:
        if name not in _OPTION_OF_HEADER:
            raise InvalidOptionError(
                f"unknown header {quoted(name)}; known are {', '.join(sorted(_OPTION_OF_HEADER))}"
            )
    return {_OPTION_OF_HEADER[name]: Text(value.strip(WHITE_SPACE)) for name, value in found.items()}


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
            raise InvalidOptionError(f"{name} is {quoted(value)}; UTF-8 text is accepted") from error
        if content_type.startswith(_JSON_TYPE):
            return parse_json(value, name, _ACCEPTED_FORMS)
    require_short(name, value)
    return Text(value.strip(WHITE_SPACE)) if isinstance(value, str) else value


def _document_options(document: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in document.items() if name not in _CONTENT_FIELDS}
    _refuse_unknown(options, "field of the JSON document,")
    return {name: value for name, value in options.items() if value is not None}


def _refuse_unknown(fields: Mapping[str, Any], what: str) -> None:
    for name in fields:
        if name not in OPTION_NAMES:
            raise InvalidOptionError(
                f"unknown {what} {quoted(name)}; known options are {', '.join(OPTION_NAMES)}"
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
        content = parse_json(content, "the JSON document", _ACCEPTED_FORMS)
    if not isinstance(content, Mapping):
        raise RequestError(
            f"the JSON document is {quoted(content)}; an object is accepted: {_ACCEPTED_FORMS}"
        )
    return content


def _as_image(content: Any) -> EncodedImage:
    if isinstance(content, str):
        raise RequestError(
            "the request has text where an image is expected; send the image's bytes with content "
            'type image/jpeg or application/octet-stream, or its base64 in JSON: {"image": "..."}'
        )
    image: EncodedImage = content
    return image


def _output_format(value: Any, accept: str) -> OutputFormat:
    if value is None:
        return _format_of_accept(accept)
    for name in CONTENT_TYPES:
        if isinstance(value, str) and value.lower() == name:
            return name
    raise InvalidOptionError(f"format is {quoted(value)}; accepted are {', '.join(CONTENT_TYPES)}")


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
                quality = parse_number(parameter[2:]) or 0.0
        if not 0 < quality <= 1:  # also NaN
            continue
        output_format = _FORMAT_OF_CONTENT_TYPE.get(media_type, "json")
        if output_format != "json" and quality > best_quality:
            best_format, best_quality = output_format, quality
        elif not media_type.startswith("image/"):
            other_quality = max(other_quality, quality)
    return best_format if best_quality > other_quality else "json"
