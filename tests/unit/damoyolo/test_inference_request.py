"""Requests of the Open Inference Protocol, from the clients' forms to what contradicts itself."""

import base64
import itertools
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError, InvalidOptionError, MissingImageError, RequestError
from damoyolo.inference_answer import OUTPUT_TENSORS, TensorRequest
from damoyolo.request import ImageRequest, RequestParser

IMAGE = b"\xff\xd8\xff\xe0" + bytes(range(256))
OTHER = b"\x89PNG another image"
CONFIG = ServingConfig(class_names=("cell", "traffic light", "7"), max_instances=4)
PARSER = RequestParser(CONFIG)
AT_ADDRESS = {"X-Inference-Protocol": "v2", "content-type": "application/json"}
ALL_OUTPUTS = tuple((name, False) for name in OUTPUT_TENSORS)


def base64_of(image):
    return base64.b64encode(image).decode()


def tensor(*images, **changes):
    """The input of a request in JSON; None takes a field away."""
    data = [base64_of(image) for image in images]
    made = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data, **changes}
    return {name: value for name, value in made.items() if value is not None}


def document(*images, parameters=None, outputs=None, request_id=None, **changes):
    made = {"inputs": [tensor(*(images or (IMAGE,)), **changes)]}
    made |= {} if parameters is None else {"parameters": parameters}
    made |= {} if outputs is None else {"outputs": outputs}
    return made | ({} if request_id is None else {"id": request_id})


def prefixed(*images):
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def parse(content, headers=AT_ADDRESS, parser=PARSER):
    body = json.dumps(content).encode() if isinstance(content, dict | list) else content
    return parser.parse({"body": bytearray(body)}, headers)


def parse_binary(
    *images,
    binary=None,
    size=None,
    count=None,
    length=None,
    parser=PARSER,
    parameters=None,
    request_parameters=None,
):
    """A request with binary data, which may lie about any of its lengths."""
    binary = prefixed(*images) if binary is None else binary
    own = {"binary_data_size": len(binary) if size is None else size, **(parameters or {})}
    shape = [len(images) if count is None else count]
    made = {"inputs": [tensor(*images, shape=shape, data=None, parameters=own)]}
    made |= {"parameters": request_parameters} if request_parameters else {}
    head = json.dumps(made).encode()
    header = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
    return parse(head + binary, header, parser)


def refusal(call, *arguments, **options):
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 450
    return caught.value


def plain(request):
    return tuple(bytes(image) for image in request.images)


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("images", [(IMAGE,), (IMAGE, OTHER, IMAGE)])
def test_json_and_binary_data_give_the_same_request(images):
    for request in (parse(document(*images)), parse_binary(*images)):
        assert plain(request) == images
        assert request.options == CONFIG.default_options()
        assert request.tensors == TensorRequest(None, ALL_OUTPUTS)
        assert request.output_format == "json"
        assert request.batched


@pytest.mark.parametrize("shape", [[2], [2, 1]])
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text]])
def test_a_column_is_a_list_and_nested_data_are_flat_data(shape, wrap):
    data = [wrap(base64_of(image)) for image in (IMAGE, OTHER)]
    assert plain(parse(document(IMAGE, OTHER, shape=shape, data=data))) == (IMAGE, OTHER)


def test_base64_may_be_a_data_url_and_binary_elements_may_be_base64():
    url = "data:image/jpeg;base64," + base64_of(IMAGE)
    assert plain(parse(document(data=[url]))) == (IMAGE,)
    text = base64_of(IMAGE).encode()
    assert plain(parse_binary(text, parameters={"content_type": "base64"})) == (IMAGE,)
    assert plain(parse_binary(text)) == (text,)
    assert plain(parse_binary(text, request_parameters={"content_type": "base64"})) == (IMAGE,)


@pytest.mark.parametrize("place", ["request", "tensor"])
@pytest.mark.parametrize("content_type", ["base64", "image/jpeg", "application/octet-stream"])
def test_content_types_of_other_servers_are_accepted(place, content_type):
    own = {"content_type": content_type}
    parameters = {"parameters": own} if place == "request" else {}
    changes = {} if place == "request" else {"parameters": own}
    made = {"inputs": [tensor(IMAGE, **changes)], **parameters}
    assert plain(parse(made)) == (IMAGE,)


def test_the_body_is_read_by_its_inputs_at_other_addresses_too():
    assert plain(parse(document(IMAGE), {})) == (IMAGE,)
    assert plain(PARSER.parse({"body": document(IMAGE)}, {})) == (IMAGE,)
    assert plain(PARSER.parse({"body": json.dumps(document(IMAGE))}, AT_ADDRESS)) == (IMAGE,)


def test_an_ordinary_request_is_none_of_the_protocol():
    assert PARSER.parse({"body": bytearray(IMAGE)}, {}).tensors is None
    assert parse({"image": base64_of(IMAGE)}, {}).tensors is None


@pytest.mark.parametrize(
    "body",
    [IMAGE, json.dumps({"image": base64_of(IMAGE)}).encode(), b"[]", b"{}", b"not json", b"\x00", b"{"],
)
def test_at_the_address_of_the_protocol_nothing_else_is_accepted(body):
    assert refusal(parse, body).status == 400


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, "empty"),
        ({"body": bytearray()}, "empty"),
        ({"data": bytearray(IMAGE)}, "a form"),
        ({"body": 5, "a": 1}, "a form"),
    ],
)
def test_a_body_that_is_empty_or_a_form_is_refused(row, found):
    error = refusal(PARSER.parse, row, AT_ADDRESS)
    assert type(error) is MissingImageError
    assert found in str(error)


def test_a_compressed_body_is_refused():
    assert "gzip" in str(refusal(parse, document(), {**AT_ADDRESS, "Content-Encoding": "gzip"}))


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"name": "input"}, '"image"'),
        ({"name": None}, '"image"'),
        ({"datatype": "UINT8"}, "BYTES"),
        ({"datatype": "bytes"}, "BYTES"),
        ({"datatype": None}, "BYTES"),
        *(
            ({"shape": shape}, "[N] or [N, 1]")
            for shape in (None, 1, [], [0], [-1], [1, 2], [1, 1, 1], [1.0], [True], ["1"])
        ),
        ({"shape": [2]}, "1 elements; its shape says 2"),
        ({"shape": [2, 1]}, "1 elements; its shape says 2"),
        ({"data": None}, "no data"),
        ({"data": "abc"}, "a list of images"),
        ({"data": {}}, "a list of images"),
        ({"data": []}, "0 elements"),
        ({"data": [5]}, "inputs[0].data[0] is 5"),
        ({"data": [None]}, "inputs[0].data[0] is None"),
        ({"data": [[[base64_of(IMAGE)]]]}, "inputs[0].data[0]"),
        ({"data": ["*"]}, "base64 is accepted"),
        ({"data": [""]}, "is empty"),
        ({"parameters": {"binary_data_size": 5}}, "both data and binary data"),
        ({"parameters": {"shared_memory_region": "x"}}, "'shared_memory_region'"),
        ({"parameters": []}, "parameters of inputs[0]"),
        ({"parameters": {"content_type": "np"}}, "content_type"),
        ({"parameters": {"content_type": 5}}, "content_type"),
        ({"extra": 1}, "'extra'"),
    ],
)
def test_a_tensor_of_another_form_is_refused_with_what_is_accepted(changes, mentions):
    error = refusal(parse, {"inputs": [tensor(IMAGE, **changes)]})
    assert error.status == 400
    assert mentions in str(error)


@pytest.mark.parametrize(
    "inputs", [None, [], {}, "image", [5], [[]], [tensor(IMAGE), tensor(IMAGE)], [None, tensor(IMAGE)]]
)
def test_other_than_one_input_is_refused(inputs):
    assert refusal(parse, {"inputs": inputs}).status == 400


def test_more_images_than_the_server_accepts_are_refused_unread():
    assert len(parse(document(*[IMAGE] * 4)).images) == 4
    for call in (
        lambda: parse(document(*[IMAGE] * 5)),
        lambda: parse(document(shape=[10**18], data=[])),
        lambda: parse_binary(IMAGE, count=10**18),
    ):
        assert "max_instances" in str(refusal(call))


@pytest.mark.parametrize("limit", [259, 260])
def test_the_limit_on_bytes_is_exact_in_json_and_binary(limit):
    parser = RequestParser(ServingConfig(max_image_bytes=limit))
    for call in (lambda: parse(document(IMAGE), parser=parser), lambda: parse_binary(IMAGE, parser=parser)):
        if limit == len(IMAGE):
            assert plain(call()) == (IMAGE,)
        else:
            assert type(refusal(call)) is ImageTooLargeError


# -------------------------------------------------------------------------------------------- binary data


@pytest.mark.parametrize("missing", range(1, len(prefixed(OTHER, OTHER))))
def test_binary_data_that_end_early_are_refused(missing):
    binary = prefixed(OTHER, OTHER)[:-missing]
    error = refusal(parse_binary, OTHER, OTHER, binary=binary)
    at_border = missing == len(prefixed(OTHER))
    assert ("have 1 elements" if at_border else "end within element") in str(error)


@pytest.mark.parametrize(
    ("lie", "mentions"),
    [
        ({"size": 3}, "both have to be the same"),
        ({"size": 10**9}, "both have to be the same"),
        ({"size": -1}, "both have to be the same"),
        ({"size": 1.0}, "both have to be the same"),
        ({"size": "24"}, "both have to be the same"),
        ({"size": True}, "both have to be the same"),
        ({"count": 2}, "have 1 elements"),
        ({"binary": prefixed(IMAGE, IMAGE, IMAGE)}, "more than 1 elements"),
        ({"binary": prefixed(IMAGE) + b"\x01"}, "end within element 1"),
        ({"binary": struct.pack("<I", 2**32 - 1) + IMAGE}, "end within element 0"),
        ({"binary": struct.pack(">I", len(IMAGE)) + IMAGE}, "end within element 0"),
        ({"binary": prefixed(b"")}, "is empty"),
        ({"binary": b""}, "have 0 elements"),
        ({"length": 0}, "Inference-Header-Content-Length"),
        ({"length": -5}, "Inference-Header-Content-Length"),
        ({"length": 10**6}, "Inference-Header-Content-Length"),
        ({"length": "12x"}, "Inference-Header-Content-Length"),
        ({"length": "1.0"}, "Inference-Header-Content-Length"),
        ({"length": ""}, "Inference-Header-Content-Length"),
        ({"length": "9" * 5000}, "Inference-Header-Content-Length"),
        ({"length": 20}, "not valid JSON"),
    ],
)
def test_lengths_that_contradict_the_body_are_refused(lie, mentions):
    error = refusal(parse_binary, IMAGE, **lie)
    assert error.status == 400
    assert mentions in str(error)


def test_bytes_that_no_tensor_owns_are_refused():
    head = json.dumps(document(IMAGE)).encode()
    header = {"Inference-Header-Content-Length": str(len(head))}
    assert "3 bytes follow" in str(refusal(parse, head + b"abc", header))
    assert plain(parse(head, header)) == (IMAGE,)


def test_many_empty_elements_cost_no_time():
    assert "is empty" in str(refusal(parse_binary, IMAGE, binary=bytes(40_000_000)))
    ones = prefixed(b"x") * 5_000_000
    assert "more than 1" in str(refusal(parse_binary, IMAGE, binary=ones))


# ------------------------------------------------------------------------------- options, outputs and id


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("score_threshold", 0.5, "score_threshold", 0.5),
        ("score_threshold", "0.5", "score_threshold", 0.5),
        ("iou_threshold", 1, "iou_threshold", 1.0),
        ("max_detections", 7, "max_detections", 7),
        ("max_detections", " 7 ", "max_detections", 7),
        ("classes", "7, cell", "class_ids", (0, 2)),
        ("classes", ["cell", 1], "class_ids", (0, 1)),
        ("classes", [1], "class_ids", (1,)),
        ("class_agnostic", True, "class_agnostic", True),
        ("class_agnostic", "true", "class_agnostic", True),
    ],
)
def test_options_are_parameters_typed_or_as_text(name, value, field, expected):
    parameters = {name: value}
    for request in (
        parse(document(parameters=parameters)),
        parse_binary(IMAGE, request_parameters=parameters),
        parse(document(parameters=parameters), {}),
    ):
        assert getattr(request.options, field) == expected


def test_a_parameter_takes_precedence_over_a_header():
    headers = {**AT_ADDRESS, "X-Detect-Max-Detections": "3", "X-Detect-Iou-Threshold": "0.1"}
    options = parse(document(parameters={"max_detections": 5, "iou_threshold": None}), headers).options
    assert (options.max_detections, options.iou_threshold) == (5, 0.1)


@pytest.mark.parametrize(
    ("parameters", "mentions"),
    [
        ({"score_treshold": 0.5}, "'score_treshold'"),
        ({"format": "png"}, "'format'"),
        ({"score_threshold": 1.5}, "from 0 to 1"),
        ({"score_threshold": "nan"}, "from 0 to 1"),
        ({"score_threshold": True}, "from 0 to 1"),
        ({"max_detections": 0}, "max_detections_limit"),
        ({"max_detections": 1e3}, "whole number"),
        ({"classes": "dog"}, "'cell'"),
        ({"classes": "x" * 70_000}, "70000 characters"),
        ({"class_agnostic": 1}, "true or false"),
        ({"binary_data_output": "true"}, "true or false"),
        ({"binary_data_output": 1}, "true or false"),
        ([], "an object"),
        ("x", "an object"),
    ],
)
def test_a_bad_parameter_is_refused(parameters, mentions):
    error = refusal(parse, document(parameters=parameters))
    assert error.status == 400
    assert mentions in str(error)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_a_number_that_json_does_not_have_is_refused(constant):
    body = json.dumps(document(parameters={"score_threshold": 0.5})).encode().replace(b"0.5", constant)
    assert "not valid JSON" in str(refusal(parse, body))
    # As TorchServe would pass it on, if it decoded the body itself.
    parsed = json.loads(body)
    assert "from 0 to 1" in str(refusal(PARSER.parse, {"body": parsed}, AT_ADDRESS))


def test_parameters_of_the_protocol_without_a_meaning_here_are_accepted():
    idle = {"sequence_id": 5, "sequence_start": True, "sequence_end": False, "priority": 1, "timeout": 10**6}
    assert parse(document(parameters=idle)).options == CONFIG.default_options()


@pytest.mark.parametrize("name", ["Format", "Score-Treshold"])
def test_a_header_without_a_meaning_in_the_protocol_is_refused(name):
    error = refusal(parse, document(), {**AT_ADDRESS, f"X-Detect-{name}": "png"})
    assert type(error) is InvalidOptionError
    assert name.lower().split("-")[0] in str(error)


def test_the_accept_header_has_no_effect():
    assert parse(document(), {**AT_ADDRESS, "Accept": "image/png"}).output_format == "json"


@pytest.mark.parametrize(
    ("parameters", "outputs", "expected"),
    [
        (None, None, ALL_OUTPUTS),
        (None, [], ALL_OUTPUTS),
        ({"binary_data_output": True}, None, tuple((name, True) for name in OUTPUT_TENSORS)),
        (None, [{"name": "scores"}, {"name": "counts"}], (("scores", False), ("counts", False))),
        (None, [{"name": "boxes", "parameters": {"binary_data": True}}], (("boxes", True),)),
        (
            {"binary_data_output": True},
            [{"name": "boxes"}, {"name": "labels", "parameters": {"binary_data": False}}],
            (("boxes", True), ("labels", False)),
        ),
        ({"binary_data_output": None}, [{"name": "boxes", "parameters": None}], (("boxes", False),)),
    ],
)
def test_outputs_are_those_asked_for_each_in_its_form(parameters, outputs, expected):
    assert parse(document(parameters=parameters, outputs=outputs)).tensors.outputs == expected


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        "boxes",
        ["boxes"],
        [{}],
        [{"name": "box"}],
        [{"name": ["boxes"]}],
        [{"name": None}],
        [{"name": "boxes"}, {"name": "boxes"}],
        [{"name": "boxes", "data": []}],
        [{"name": "boxes", "parameters": {"classification": 3}}],
        [{"name": "boxes", "parameters": {"binary_data": 1}}],
        [{"name": "boxes", "parameters": []}],
    ],
)
def test_outputs_of_another_form_are_refused(outputs):
    assert refusal(parse, document(outputs=outputs)).status == 400


def test_the_id_is_kept():
    assert parse(document(request_id="größe \n")).tensors.request_id == "größe \n"
    for value in (5, ["a"], "x" * 1025):
        assert "id is" in str(refusal(parse, document(request_id=value)))


def test_the_name_of_the_model_is_ignored_and_other_fields_are_refused():
    assert plain(parse({**document(), "model_name": "x", "model_version": "1"})) == (IMAGE,)
    assert "'image'" in str(refusal(parse, {**document(), "image": base64_of(IMAGE)}))


# ------------------------------------------------------------------------------------- whatever else comes


def outcome_of(call, *arguments, **options):
    """The request or its error."""
    try:
        return call(*arguments, **options)
    except RequestError as error:
        return error


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.just(base64_of(IMAGE)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("name", "shape", "datatype", "data", "parameters", "binary_data_size", "content_type")
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(("id", "inputs", "outputs", "parameters", "image")), json_values, max_size=4
    ),
    st.sampled_from(("name", "shape", "datatype", "data", "parameters")),
    json_values,
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_any_document_is_read_or_refused(fields, field, value, whole):
    made = fields if whole else {**document(**{field: value}), **fields}
    outcome = outcome_of(parse, made)
    if isinstance(outcome, RequestError):
        assert 400 <= outcome.status < 500
        assert str(outcome).isascii()
        assert str(outcome).isprintable()
        assert len(str(outcome)) < 500
    else:
        assert isinstance(outcome, ImageRequest)
        assert all(len(image) for image in outcome.images)


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_binary_data_are_read_or_refused(images, data):
    damaged = bytearray(prefixed(*images))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    outcome = outcome_of(parse_binary, *images, binary=bytes(damaged))
    if isinstance(outcome, RequestError):
        assert outcome.status == 400
    else:
        assert len(outcome.images) == len(images)
        assert prefixed(*plain(outcome)) == bytes(damaged)
    assert plain(parse_binary(*images)) == tuple(images)


@given(st.lists(st.binary(max_size=40), max_size=3), st.integers(-3, 400))
@settings(max_examples=200, deadline=None)
def test_any_length_of_the_json_part_is_read_or_refused(parts, length):
    body = b"".join(itertools.chain([json.dumps(document()).encode()], parts))
    outcome = outcome_of(parse, body, {"inference-header-content-length": str(length)})
    assert isinstance(outcome, ImageRequest) or outcome.status == 400
