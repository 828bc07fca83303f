"""Read requests of the Open Inference Protocol v2: images as one tensor of BYTES.

The tensor is named `image` and has the shape [N] or [N, 1]; each element is an encoded image. Its data are
base64 in the JSON document, or binary after it (the binary tensor data extension): before each element its
length as 4 bytes, little-endian, and in a header of the request the length of the JSON part.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from damoyolo.errors import InvalidOptionError, MissingImageError, RequestError, quoted
from damoyolo.formats import EncodedImage
from damoyolo.inference_answer import (
    BINARY_CONTENT_TYPE,
    ELEMENT_LENGTH,
    JSON_LENGTH_HEADER,
    OUTPUT_TENSORS,
    TensorRequest,
)
from damoyolo.option_values import DETECTION_OPTIONS, WHITE_SPACE, Text, parse_bool, require_short
from damoyolo.request_images import ImageReader
from damoyolo.strict_json import parse_json, parse_number

# Headers of a request of the protocol, in lower case. The front-end plugin sets the first one at addresses of
# the protocol, where requests of other forms are refused.
ADDRESS_HEADER = "x-inference-protocol"
LENGTH_HEADER = JSON_LENGTH_HEADER.lower()

# Triton defines these for models with a state or with priorities. Here they have no effect.
_IDLE_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
_PARAMETERS = (*DETECTION_OPTIONS, "binary_data_output", "content_type", *_IDLE_PARAMETERS)
# kserve's client sends the name of the model in the document, too.
_DOCUMENT_FIELDS = ("id", "parameters", "inputs", "outputs", "model_name", "model_version")
_INPUT_FIELDS = ("name", "datatype", "shape", "data", "parameters")
_INPUT_VALUES = {"name": "image", "datatype": "BYTES"}
_NO_BYTES = memoryview(b"")
_MAX_ID = 1024  # characters
_ACCEPTED = (
    'accepted is one input {"name": "image", "datatype": "BYTES", "shape": [N], "data": [N images, base64]}, '
    "or binary data in place of data"
)


class InferenceContent(NamedTuple):
    """What a request of the protocol holds.

    images: at least one, none of them empty.
    values: values of options by name, as `OptionReader.read` takes them.
    tensors: for the answer.
    """

    images: tuple[EncodedImage, ...]
    values: dict[str, Any]
    tensors: TensorRequest


class InferenceReader:
    """Reads requests of the protocol."""

    def __init__(self, images: ImageReader) -> None:
        self._images = images

    def read(self, row: Mapping[str, Any], header_texts: Mapping[str, str]) -> InferenceContent:
        """Read a row that has one of the two headers of the protocol.

        header_texts: the headers, names in lower case.

        Raises:
            MissingImageError: there is no image where one should be.
            ImageTooLargeError: an image has more bytes, or several have more pixels, than the settings allow.
            RequestError: the request is none of the protocol, or contradicts itself.
        """
        encoding = header_texts.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"Content-Encoding is {quoted(encoding)}; no compression is accepted")
        content = row.get("body")
        if len(row) != 1 or not content:
            found = "empty" if not any(row.values()) else "a form"
            raise MissingImageError(f"the body is {found}; a JSON document is expected; {_ACCEPTED}")
        binary = _NO_BYTES
        if isinstance(content, bytes | bytearray | memoryview):
            body = memoryview(content)
            length = _json_length(header_texts.get(LENGTH_HEADER), len(body))
            content, binary = body[:length], body[length:]
        if isinstance(content, str | memoryview):
            content = parse_json(content, "the JSON document", _ACCEPTED)
        return self.read_document(content, binary)

    def read_document(self, document: Any, binary: memoryview = _NO_BYTES) -> InferenceContent:
        """Read a parsed document. `binary`: what follows it.

        Raises:
            MissingImageError, ImageTooLargeError, RequestError: as `read`.
        """
        document = _object(document, "the JSON document", _DOCUMENT_FIELDS)
        parameters = _object(document.get("parameters"), "parameters", _PARAMETERS)
        images = self._input_images(document.get("inputs"), parameters.get("content_type"), binary)
        values = {
            name: _option_value(name, value)
            for name, value in parameters.items()
            if name in DETECTION_OPTIONS and value is not None
        }
        is_binary = _flag(parameters, "binary_data_output", default=False)
        outputs = _requested_outputs(document.get("outputs"), is_binary)
        return InferenceContent(images, values, TensorRequest(_request_id(document.get("id")), outputs))

    def _input_images(self, inputs: Any, content_type: Any, binary: memoryview) -> tuple[EncodedImage, ...]:
        if not isinstance(inputs, list) or len(inputs) != 1:
            raise MissingImageError(f"inputs is {quoted(inputs)}; {_ACCEPTED}")
        tensor = _object(inputs[0], "inputs[0]", _INPUT_FIELDS)
        for field, accepted in _INPUT_VALUES.items():
            if tensor.get(field) != accepted:
                raise RequestError(f"{field} of inputs[0] is {quoted(tensor.get(field))}; {_ACCEPTED}")
        count = _image_count(tensor.get("shape"))
        self._images.require_count(count, "inputs[0]")
        parameters = _object(
            tensor.get("parameters"), "parameters of inputs[0]", ("binary_data_size", "content_type")
        )
        is_base64 = _is_base64(parameters.get("content_type") or content_type)
        data, size = tensor.get("data"), parameters.get("binary_data_size")
        if (data is None) == (size is None):
            found = "no data" if data is None else "both data and binary data"
            raise RequestError(f"inputs[0] has {found}; {_ACCEPTED} and the parameter binary_data_size")
        elements: Sequence[Any]
        if data is not None:
            elements, is_base64 = _json_elements(data, count, len(binary)), True
        else:
            elements = _binary_elements(binary, size, count)
        images = tuple(
            self._image(element, f"inputs[0].data[{index}]", is_base64)
            for index, element in enumerate(elements)
        )
        self._images.require_pixels(images, "inputs[0]")
        return images

    def _image(self, element: Any, place: str, is_base64: bool) -> EncodedImage:
        if not is_base64:
            return self._images.from_bytes(element)
        text = str(element, "latin-1") if isinstance(element, memoryview) else element
        return self._images.from_base64(text, place)


def _object(value: Any, what: str, fields: Sequence[str]) -> Mapping[str, Any]:
    """A JSON object with no other fields; an empty one in place of null."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} is {quoted(value)}; an object with {', '.join(fields)} is accepted")
    for name in value:
        if name not in fields:
            raise InvalidOptionError(f"{what} has {quoted(name)}; accepted are {', '.join(fields)}")
    return value


def _json_length(text: str | None, body_length: int) -> int:
    if text is None:
        return body_length
    length = parse_number(text.strip(WHITE_SPACE))
    if not isinstance(length, int) or not 0 < length <= body_length:
        raise RequestError(
            f"the header {JSON_LENGTH_HEADER} is {quoted(text)} and the body has {body_length} bytes; "
            "the length of its JSON part is accepted"
        )
    return length


def _image_count(shape: Any) -> int:
    is_list = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not is_list or len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or shape[0] < 1:
        found = quoted(str(shape[:9]) if is_list else shape)
        raise RequestError(f"shape of inputs[0] is {found}; [N] or [N, 1] is accepted, for N images")
    return int(shape[0])


def _is_base64(content_type: Any) -> bool:
    """Whether the elements of binary data are base64, as MLServer's content type of a tensor says."""
    if content_type is None or content_type == BINARY_CONTENT_TYPE:
        return False
    if isinstance(content_type, str) and content_type.startswith("image/"):
        return False
    if content_type != "base64":
        raise InvalidOptionError(
            f"content_type is {quoted(content_type)}; base64, {BINARY_CONTENT_TYPE} or image/... is accepted"
        )
    return True


def _json_elements(data: Any, count: int, following: int) -> list[Any]:
    """The elements in order; the lists may be nested as the shape says, or flat."""
    if following:
        raise RequestError(f"{following} bytes follow the JSON document, and inputs[0] has its data in it")
    if not isinstance(data, list):
        raise RequestError(f"data of inputs[0] is {quoted(data)}; a list of images in base64 is accepted")
    elements = [element for entry in data for element in (entry if isinstance(entry, list) else [entry])]
    if len(elements) != count:
        raise RequestError(f"data of inputs[0] has {len(elements)} elements; its shape says {count}")
    return elements


def _binary_elements(binary: memoryview, size: Any, count: int) -> list[memoryview]:
    if type(size) is not int or size != len(binary):
        raise RequestError(
            f"binary_data_size of inputs[0] is {quoted(size)}, and {len(binary)} bytes follow the JSON part "
            f"(header {JSON_LENGTH_HEADER}); both have to be the same"
        )
    elements: list[memoryview] = []
    position = 0
    while position < size and len(elements) <= count:
        start = position + ELEMENT_LENGTH.size
        position = start if start > size else start + ELEMENT_LENGTH.unpack_from(binary, position)[0]
        if position > size:
            raise RequestError(
                f"the binary data of inputs[0] end within element {len(elements)}; an element is its length "
                "as 4 bytes, little-endian, and so many bytes"
            )
        if position == start:
            raise MissingImageError(f"inputs[0].data[{len(elements)}] is empty; an encoded image is accepted")
        elements.append(binary[start:position])
    if len(elements) != count:
        found = f"more than {count}" if len(elements) > count else len(elements)
        raise RequestError(f"the binary data of inputs[0] have {found} elements; its shape says {count}")
    return elements


def _option_value(name: str, value: Any) -> Any:
    """Also as text: some clients have no type for fractions."""
    require_short(name, value)
    return Text(value.strip(WHITE_SPACE)) if isinstance(value, str) else value


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name)
    return default if value is None else parse_bool(name, value)


def _requested_outputs(outputs: Any, is_binary: bool) -> tuple[tuple[str, bool], ...]:
    if outputs is None or outputs == []:
        return tuple((name, is_binary) for name in OUTPUT_TENSORS)
    if not isinstance(outputs, list):
        raise RequestError(f"outputs is {quoted(outputs)}; a list of objects with a name is accepted")
    found: dict[str, bool] = {}
    for index, output in enumerate(outputs):
        what = f"outputs[{index}]"
        output = _object(output, what, ("name", "parameters"))
        name = output.get("name")
        if not isinstance(name, str) or name not in OUTPUT_TENSORS or name in found:
            raise RequestError(
                f"name of {what} is {quoted(name)}; each of {', '.join(OUTPUT_TENSORS)} is accepted once"
            )
        parameters = _object(output.get("parameters"), f"parameters of {what}", ("binary_data",))
        found[name] = _flag(parameters, "binary_data", is_binary)
    return tuple(found.items())


def _request_id(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_ID:
        raise RequestError(f"id is {quoted(value)}; a string of at most {_MAX_ID} characters is accepted")
    return value
