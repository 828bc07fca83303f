import base64
import json
import re

import pytest

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError, InvalidOptionError, MissingImageError, RequestError
from damoyolo.request import OPTION_NAMES, ImageRequest, RequestParser, asks_for_model_card
from damoyolo.response import CONTENT_TYPES
from damoyolo.structures import DetectionOptions

IMAGE = b"\xff\xd8\xff\xe0" + bytes(range(256))
IMAGE_BASE64 = base64.b64encode(IMAGE).decode()
CONFIG = ServingConfig(class_names=("cell", "traffic light", "7", "salt, pepper", "größe"))
DEFAULTS = CONFIG.default_options()


def parse(row, headers=None, config=CONFIG):
    return RequestParser(config).parse(row, headers or {})


def refusal(row, headers=None):
    with pytest.raises(RequestError) as caught:
        parse(row, headers)
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 450
    return caught.value


# The channels that an option can come through, as TorchServe passes them on.
def by_form(name, text, _):
    return parse({"data": bytearray(IMAGE), name: bytearray(text.encode())})


def by_query(name, text, _):
    return parse({"body": bytearray(IMAGE), name: text})


def by_header(name, text, _):
    spelling = "-".join(part.capitalize() for part in ("x-detect-" + name.replace("_", "-")).split("-"))
    return parse({"body": bytearray(IMAGE)}, {spelling: text})


def by_json(name, _, value):
    return parse({"body": {"image": IMAGE_BASE64, name: value}})


def by_json_bytes(name, _, value):
    return parse({"body": bytearray(json.dumps({"image": IMAGE_BASE64, name: value}).encode())})


CHANNELS = [by_form, by_query, by_header, by_json, by_json_bytes]


# ---------------------------------------------------------------------------------------------- images


def test_an_image_declared_as_json_is_the_image():
    as_json = {"content-type": "application/json"}
    assert parse({"body": bytearray(IMAGE)}, as_json) == ImageRequest(
        (IMAGE,), DEFAULTS, "json", batched=False
    )


def test_a_text_of_classes_is_bounded_in_json_too():
    document = {"image": IMAGE_BASE64, "classes": "0," * 40_000}
    assert "at most 65536" in str(refusal({"body": bytearray(json.dumps(document).encode())}))


@pytest.mark.parametrize("field", ["body", "data", "image"])
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_raw_body_or_a_multipart_field_is_the_image(field, wrap):
    assert parse({field: wrap(IMAGE)}) == ImageRequest((IMAGE,), DEFAULTS, "json", batched=False)


JSON_FORMS = [
    lambda document: {"body": document},
    lambda document: {"body": bytearray(json.dumps(document).encode())},
    lambda document: {"body": bytearray(b"\xef\xbb\xbf \r\n" + json.dumps(document).encode())},
    lambda document: {"body": memoryview(json.dumps(document).encode())},
    lambda document: {"body": "\n" + json.dumps(document)},
    lambda document: {"data": document},
]


@pytest.mark.parametrize("row_of", JSON_FORMS)
def test_json_with_base64_is_read_parsed_or_not(row_of):
    assert parse(row_of({"image": IMAGE_BASE64})) == ImageRequest((IMAGE,), DEFAULTS, "json", False)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("row_of", JSON_FORMS)
def test_instances_keep_their_order_and_get_predictions(row_of, count):
    images = [bytes([i]) * 5 for i in range(count)]
    document = {"instances": [{"b64": base64.b64encode(image).decode()} for image in images]}
    assert parse(row_of(document)) == ImageRequest(tuple(images), DEFAULTS, "json", batched=True)


@pytest.mark.parametrize(
    ("document", "batched"),
    [
        ({"image": {"b64": IMAGE_BASE64}}, False),
        ({"data": IMAGE_BASE64}, False),
        ({"data": {"b64": IMAGE_BASE64}}, False),
        ({"instances": [{"image": {"b64": IMAGE_BASE64}}]}, True),
        ({"instances": [{"image": IMAGE_BASE64}]}, True),
        ({"instances": [{"data": IMAGE_BASE64}]}, True),
        ({"instances": [{"data": {"b64": IMAGE_BASE64}}]}, True),
    ],
)
def test_the_forms_of_kserve_v1_and_of_torchserves_handlers_are_read(document, batched):
    assert parse({"body": document}) == ImageRequest((IMAGE,), DEFAULTS, "json", batched)
    with_option = parse({"body": {**document, "max_detections": 3}})
    assert with_option.options.max_detections == 3


def test_instances_of_several_forms_keep_their_order():
    texts = [base64.b64encode(bytes([i]) * 5).decode() for i in range(3)]
    instances = [{"b64": texts[0]}, {"image": {"b64": texts[1]}}, {"data": texts[2]}]
    assert parse({"body": {"instances": instances}}).images == tuple(bytes([i]) * 5 for i in range(3))


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/jpeg;base64,{IMAGE_BASE64}",
        f"DATA:;BASE64,{IMAGE_BASE64}",
        base64.encodebytes(IMAGE).decode(),
        IMAGE_BASE64.replace("/", "/ ").replace("8", "8\r\n\t"),
    ],
)
def test_data_urls_and_wrapped_base64_are_read(text):
    assert parse({"body": {"image": text}}).images == (IMAGE,)
    assert parse({"body": {"instances": [{"b64": text}]}}).images == (IMAGE,)


@pytest.mark.parametrize(
    "text",
    [
        "no base64!",
        IMAGE_BASE64[:-1],
        IMAGE_BASE64 + "=",
        "____" + IMAGE_BASE64,
        "größe" * 30,
        "data:image/jpeg," + IMAGE_BASE64,
        "data:image/jpeg;base64" + IMAGE_BASE64,
        "data:",
        17,
        True,
        [IMAGE_BASE64],
        {"b64": 5},
        {"b64": IMAGE_BASE64, "x": 1},
        {"image": IMAGE_BASE64},
    ],
)
def test_anything_but_base64_is_refused(text):
    assert re.match(r"image(\.b64)? is ", str(refusal({"body": {"image": text}})))
    assert re.match(r"data(\.b64)? is ", str(refusal({"body": {"data": text}})))
    error = refusal({"body": {"instances": [{"b64": IMAGE_BASE64}, {"b64": text}]}})
    assert error.status == 400
    assert "instances[1].b64" in str(error)
    assert "base64" in str(error)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"body": bytearray()},
        {"body": b""},
        {"body": ""},
        {"body": None},
        {"body": []},
        {"body": {}},
        {"body": bytearray(b"{}")},
        {"data": bytearray()},
        {"score_threshold": bytearray(b"0.5")},
        {"unheard of": bytearray(b"0.5")},
        {"body": {"score_threshold": 0.5}},
        {"body": {"instances": []}},
        {"body": {"instances": None}},
    ],
)
def test_a_request_without_an_image_is_refused_with_every_accepted_form(row):
    error = refusal(row)
    assert type(error) is MissingImageError
    assert error.status == 400
    for form in ("request body", "multipart", "data, body or image", '{"image"', '{"instances"'):
        assert form in str(error)


@pytest.mark.parametrize("document", [{"image": ""}, {"image": " \n"}, {"image": "data:image/png;base64,"}])
def test_an_empty_text_is_a_missing_image(document):
    error = refusal({"body": document})
    assert type(error) is MissingImageError
    assert "image is empty" in str(error)


def test_an_image_sent_as_a_form_is_refused_with_the_curl_option():
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert "-T" in str(refusal({"\xff\xd8garbage": bytearray()}, headers))
    assert "curl" not in str(refusal({}, {}))


def test_two_image_fields_are_refused():
    error = refusal({"data": bytearray(IMAGE), "image": bytearray(IMAGE)})
    assert "data and image" in str(error)
    assert "exactly one" in str(error)
    assert "exactly one" in str(
        refusal({"body": {"image": IMAGE_BASE64, "instances": [{"b64": IMAGE_BASE64}]}})
    )
    assert "exactly one" in str(refusal({"body": {"image": IMAGE_BASE64, "data": IMAGE_BASE64}}))


@pytest.mark.parametrize("document", [5, "text", [1], True, IMAGE_BASE64])
def test_text_and_json_that_is_not_an_object_are_refused(document):
    error = refusal({"body": document})
    assert error.status == 400
    assert '{"image": "..."}' in str(error)


@pytest.mark.parametrize(
    "instances",
    [
        5,
        "text",
        {"b64": IMAGE_BASE64},
        [IMAGE_BASE64],
        [{}],
        [{"b64": IMAGE_BASE64, "x": 1}],
        [{"b64": IMAGE_BASE64, "image": IMAGE_BASE64}],
        [{"image": IMAGE_BASE64, "data": IMAGE_BASE64}],
        [{"x": IMAGE_BASE64}],
    ],
)
def test_instances_of_another_form_are_refused(instances):
    assert '{"b64": "..."}' in str(refusal({"body": {"instances": instances}}))


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"image": "abc', b"{\xff}", b'{"image": ' + b"[" * 100_000, b'{"a": 1' + b"0" * 9999 + b"x}"],
)
def test_broken_json_is_refused_with_the_place(body):
    error = refusal({"body": bytearray(body)})
    assert error.status == 400
    assert "not" in str(error)
    assert "JSON" in str(error)


def test_more_instances_than_the_server_accepts_are_refused():
    config = ServingConfig(max_instances=3)
    document = {"instances": [{"b64": IMAGE_BASE64}] * 3}
    assert len(parse({"body": document}, config=config).images) == 3
    document["instances"] *= 2
    with pytest.raises(RequestError, match=r"6 images; at most 3.*max_instances"):
        parse({"body": document}, config=config)


@pytest.mark.parametrize(
    "row_of",
    [
        lambda image: {"data": bytearray(image)},
        lambda image: {"body": {"image": base64.b64encode(image).decode()}},
        lambda image: {"body": {"image": base64.encodebytes(image).decode()}},
        lambda image: {"body": {"instances": [{"b64": base64.b64encode(image).decode()}]}},
    ],
)
@pytest.mark.parametrize("limit", [99, 100, 101])
def test_the_limit_on_bytes_is_exact_in_every_form(row_of, limit):
    config = ServingConfig(max_image_bytes=limit)
    assert parse(row_of(bytes(limit)), config=config).images == (bytes(limit),)
    with pytest.raises(ImageTooLargeError, match=rf"{limit + 1} bytes.*max_image_bytes"):
        parse(row_of(bytes(limit + 1)), config=config)


def test_too_much_base64_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageTooLargeError):
        parse({"body": {"image": IMAGE_BASE64}}, config=ServingConfig(max_image_bytes=50))


# ----------------------------------------------------------------------------------------------- options


def test_the_server_settings_are_the_defaults():
    config = ServingConfig(score_threshold=0.1, iou_threshold=0.2, max_detections=3)
    assert parse({"body": IMAGE}, config=config).options == DetectionOptions(0.1, 0.2, 3, None, False)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("name", "text", "value", "field", "expected"),
    [
        ("score_threshold", "0.5", 0.5, "score_threshold", 0.5),
        ("score_threshold", " 0 ", 0, "score_threshold", 0.0),
        ("iou_threshold", "1", 1, "iou_threshold", 1.0),
        ("iou_threshold", "6e-1", 0.6, "iou_threshold", 0.6),
        ("max_detections", "1", 1, "max_detections", 1),
        ("max_detections", "1000", 1000, "max_detections", 1000),
        ("classes", "cell", "cell", "class_ids", (0,)),
        ("classes", "traffic light , 0", ["traffic light", 0], "class_ids", (0, 1)),
        ("classes", "3,1,3", [3, 1, 3], "class_ids", (1, 3)),
        ("classes", "3,1", "3,1", "class_ids", (1, 3)),
        ("classes", "7", ["7"], "class_ids", (2,)),
        ("class_agnostic", "true", True, "class_agnostic", True),
        ("class_agnostic", "False", False, "class_agnostic", False),
        ("class_agnostic", "1", True, "class_agnostic", True),
        ("class_agnostic", "0", False, "class_agnostic", False),
    ],
)
def test_every_option_comes_through_every_channel(channel, name, text, value, field, expected):
    options = channel(name, text, value).options
    assert getattr(options, field) == expected
    assert type(getattr(options, field)) is type(expected)
    for other in {"score_threshold", "iou_threshold", "max_detections", "class_ids", "class_agnostic"} - {
        field
    }:
        assert getattr(options, other) == getattr(DEFAULTS, other)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("output_format", CONTENT_TYPES)
def test_the_output_format_comes_through_every_channel(channel, output_format):
    assert channel("format", output_format, output_format).output_format == output_format
    assert channel("format", output_format.upper(), output_format.upper()).output_format == output_format


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("name", "text", "value", "accepted"),
    [
        ("score_threshold", "1.01", 1.01, "from 0 to 1"),
        ("score_threshold", "-0.1", -0.1, "from 0 to 1"),
        ("score_threshold", "nan", "nan", "from 0 to 1"),
        ("score_threshold", "Infinity", "1", "from 0 to 1"),
        ("score_threshold", "half", "0.5", "from 0 to 1"),
        ("iou_threshold", "", True, "from 0 to 1"),
        ("iou_threshold", "0,5", [0.5], "from 0 to 1"),
        ("max_detections", "0", 0, "from 1 to 1000"),
        ("max_detections", "1001", 1001, "max_detections_limit"),
        ("max_detections", "2.5", 2.5, "whole number"),
        ("max_detections", "many", "5", "whole number"),
        ("max_detections", "9" * 5000, True, "whole number"),
        ("classes", "dog", ["dog"], "'cell', 'traffic light'"),
        ("classes", "5", [5], "ids from 0 to 4"),
        ("classes", "-1", [-1], "ids from 0 to 4"),
        ("classes", "0,", ["cell", ""], "ids from 0 to 4"),
        ("classes", "0,1.0", [1.0], "ids from 0 to 4"),
        ("classes", "x" * 5000, ["x" * 5000], "ids from 0 to 4"),
        ("classes", "\x07", [[0]], "ids from 0 to 4"),
        ("classes", "größer", [True], "ids from 0 to 4"),
        ("classes", "", [], "leave it out"),
        ("classes", " ", {"cell": 1}, "leave it out"),
        ("class_agnostic", "maybe", 1, "true or false"),
        ("class_agnostic", "", 0, "true or false"),
        ("class_agnostic", "2", "true", "true or false"),
        ("class_agnostic", "0.0", "0", "true or false"),
        ("format", "gif", "gif", "json, jpeg, png"),
        ("format", "", 3, "json, jpeg, png"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_accepted(channel, name, text, value, accepted):
    with pytest.raises(InvalidOptionError) as caught:
        channel(name, text, value)
    message = str(caught.value)
    assert caught.value.status == 400
    assert message.startswith(name)
    assert accepted in message
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 300


# What Python's float() or int() takes for a number, and JSON does not.
@pytest.mark.parametrize("channel", [by_form, by_query, by_header])
@pytest.mark.parametrize(
    "text",
    [
        *("1_0", "0_1", "+1", "01", "1.", ".5", "1 0", "1\n1", "0x1", "1e", "-", ""),
        *("\u0660", "\u0661", "\uff11", "0.\u0665", "1\u00a0", "\u30001"),
        *("1e400", "nan", "-nan", "inf", "-inf", "infinity", "0." + "1" * 100_000),
    ],
)
def test_only_a_number_of_json_is_a_number(channel, text):
    for name in ("score_threshold", "iou_threshold", "max_detections", "classes"):
        with pytest.raises(InvalidOptionError) as caught:
            channel(name, text, None)
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", ["1_0", "\uff10", "+0", "00", " 0", "0.0"])
def test_a_class_id_in_a_json_string_is_a_number_of_json(entry):
    with pytest.raises(InvalidOptionError):
        by_json("classes", "", [entry])


def test_a_number_too_small_to_hold_is_zero():
    assert by_form("score_threshold", "1e-400", None).options.score_threshold == 0.0


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", ""]
)
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"image": NaN}', "NaN"),
        (b'{"image": -Infinity}', "-Infinity"),
        (b'{"image": "QUJD", "image": "QUJE"}', "name twice"),
        (b'{"image": "QUJD", "max_detections": 1, "max_detections": 2}', "name twice"),
        (b'{"max_detections": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"max_detections": -' + b"1" * 5_000_000 + b"}", "digits"),
        (b'{"image": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 49_000 + b"1" + b"}" * 49_000, "nested too deeply"),
        (b'{"image": [' + b"[]," * 5_000_000 + b"1]}", "100000 values"),
        (b'{"image": "\xff"}', "UTF-8 at byte 11"),
        (b'{"image": "secret', "at character 10"),
        (b'{"image": "secret\n"}', "control character"),
        (b'{"secret"}', "at character"),
    ],
)
def test_json_that_only_python_would_read_or_that_takes_long_is_refused(body, reason, content_type):
    error = refusal({"body": bytearray(body)}, {"Content-Type": content_type})
    assert error.status == 400
    assert reason in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b"null", b"17", b"not json", b"\xff\xd8"])
def test_the_content_type_of_json_makes_any_content_json(body):
    assert "JSON" in str(refusal({"body": bytearray(body)}, {"content-type": "application/json"}))
    assert parse({"body": bytearray(body)}, {"content-type": "image/jpeg"}).images == (body,)


def test_a_multipart_field_may_be_json():
    as_json = {"content-type": "application/json"}
    row = {"data": bytearray(IMAGE), "classes": bytearray(b'["cell", 1]'), "max_detections": bytearray(b"7")}
    options = parse(row, {"classes": as_json, "max_detections": as_json, "data": {}}).options
    assert (options.class_ids, options.max_detections) == ((0, 1), 7)
    assert "NaN" in str(refusal({**row, "classes": bytearray(b"[NaN]")}, {"classes": as_json}))
    document = bytearray(json.dumps({"image": IMAGE_BASE64}).encode())
    assert parse({"data": document}, {"data": as_json}).images == (IMAGE,)
    assert "JSON" in str(refusal({"data": bytearray(b"[]")}, {"data": as_json}))


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_a_text_too_long_for_any_option_is_refused_unread(name):
    for text in ("1," * 5_000_000, "x" * 65_537):
        error = refusal({"data": bytearray(IMAGE), name: bytearray(text.encode())})
        assert type(error) is InvalidOptionError
        assert f"{name} has {len(text)} characters; at most 65536" in str(error)


def test_hundreds_of_fields_and_odd_names_are_refused_in_short():
    odd = ["\x00", "\n[METRICS]x.Count:1", "a" * 70_000, "\ud800", "💥", "data\r\n", "__class__", " body"]
    for names in (odd, [f"field{i}" for i in range(5000)]):
        row = {"data": bytearray(IMAGE)} | {name: bytearray(b"1") for name in names}
        assert "\n" not in str(refusal(row))
        assert "\n" not in str(
            refusal({"body": bytearray(IMAGE)}, {f"X-Detect-{name}": "1" for name in names})
        )
        assert parse({"body": bytearray(IMAGE)}, dict.fromkeys(names, "1")).options == DEFAULTS


@pytest.mark.parametrize(
    ("row", "headers", "expected"),
    [
        ({}, {"describe": "True"}, True),
        ({"body": bytearray()}, {"describe": "True"}, True),
        ({"body": bytearray(IMAGE)}, {"describe": "True"}, False),
        ({}, {"describe": "true"}, False),
        ({}, {"describe": {"content-type": "True"}}, False),
        ({}, {}, False),
    ],
)
def test_only_a_question_without_content_asks_for_the_model_card(row, headers, expected):
    assert asks_for_model_card(row, headers) is expected


def test_a_json_list_takes_any_class_name_and_a_form_those_without_commas():
    assert by_json("classes", "", ["größe", "salt, pepper"]).options.class_ids == (3, 4)
    assert by_form("classes", "größe", None).options.class_ids == (4,)


def test_of_many_classes_only_a_few_are_named():
    config = ServingConfig(class_names=tuple(f"class {i}" for i in range(500)))
    with pytest.raises(InvalidOptionError, match=r"0 to 499.*'class 0', .*'class 7', \.\.\.$"):
        parse({"body": IMAGE, "classes": "dog"}, config=config)


def test_null_in_json_counts_as_absent():
    document = dict.fromkeys(OPTION_NAMES) | {"image": IMAGE_BASE64}
    assert parse({"body": document}) == ImageRequest((IMAGE,), DEFAULTS, "json", batched=False)


def test_options_apply_to_all_instances():
    request = parse({"body": {"instances": [{"b64": IMAGE_BASE64}] * 2, "max_detections": 7}})
    assert len(request.images) == 2
    assert request.options.max_detections == 7


@pytest.mark.parametrize(
    "name", ["conf", "Score_Threshold", "score-threshold", "data2", "x" * 9999, "\xff\xd8\x00"]
)
def test_an_unknown_field_is_refused_with_the_known_ones(name):
    for row in (
        {"data": bytearray(IMAGE), name: bytearray(b"0.5")},
        {"body": {"image": IMAGE_BASE64, name: 0.5}},
    ):
        error = refusal(row)
        assert type(error) is InvalidOptionError
        assert ascii(name)[:40] in str(error)
        assert ", ".join(OPTION_NAMES) in str(error)


@pytest.mark.parametrize("name", ["X-Detect-Conf", "x-detect-", "X-Detect-Score_Threshold"])
def test_an_unknown_detect_header_is_refused_with_the_known_ones(name):
    error = refusal({"body": IMAGE}, {name: "0.5"})
    assert type(error) is InvalidOptionError
    assert name.lower() in str(error)
    assert "x-detect-score-threshold" in str(error)


def test_other_headers_and_the_model_name_are_no_options():
    headers = {
        "User-Agent": "x",
        "X-Request-Id": "1",
        "body": {"content-type": "image/jpeg"},
        "X-Detect-Format": {},
    }
    assert parse({"body": IMAGE, "model_name": bytearray(b"damoyolo")}, headers).options == DEFAULTS


@pytest.mark.parametrize(
    "spelling", ["X-Detect-Max-Detections", "x-detect-max-detections", "X-DETECT-MAX-DETECTIONS"]
)
def test_header_names_may_have_any_case(spelling):
    assert parse({"body": IMAGE}, {spelling: "5"}).options.max_detections == 5


def test_json_takes_precedence_over_form_over_header_over_default():
    headers = {
        "X-Detect-Max-Detections": "4",
        "X-Detect-Score-Threshold": "0.4",
        "X-Detect-Iou-Threshold": "0.4",
    }
    row = {
        "body": {"image": IMAGE_BASE64, "max_detections": 2},
        "max_detections": bytearray(b"3"),
        "score_threshold": bytearray(b"0.3"),
    }
    assert parse(row, headers).options == DetectionOptions(0.3, 0.4, 2)


def test_a_form_field_that_is_not_text_is_refused():
    error = refusal({"data": IMAGE, "score_threshold": bytearray(b"\xff\xfe")})
    assert type(error) is InvalidOptionError
    assert "UTF-8" in str(error)


# -------------------------------------------------------------------------------------------- Accept header


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("image/*", "json"),
        ("image/gif", "json"),
        ("image/jpeg", "jpeg"),
        ("IMAGE/PNG", "png"),
        ("image/png;q=0.5", "png"),
        ("image/jpeg;q=0.5, image/png", "png"),
        ("image/jpeg, image/png", "jpeg"),
        ("image/png, image/jpeg", "png"),
        ("image/jpeg, */*;q=0.1", "jpeg"),
        ("image/jpeg;q=0.3, application/json", "json"),
        ("image/jpeg, application/json", "json"),
        ("image/jpeg, application/json;q=0.9", "jpeg"),
        ("image/jpeg ; level=1 ; q=0.8 , text/html;q=0.7", "jpeg"),
        ("image/jpeg;q=0", "json"),
        ("image/jpeg;q=nan", "json"),
        ("image/jpeg;q=2", "json"),
        ("image/jpeg;q=", "json"),
        ("text/plain", "json"),
        ("application/json, text/plain, */*", "json"),
        (",;,q=1", "json"),
        # What browsers send for a page, and for an image in a page:
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", "json"),
        ("text/html,application/xml;q=0.9,image/avif,image/webp,image/png,image/svg+xml,*/*;q=0.8", "json"),
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "png"),
    ],
)
def test_the_accept_header_decides_the_format(accept, expected):
    assert parse({"body": IMAGE}, {"aCCept": accept}).output_format == expected


def test_the_format_option_takes_precedence_over_the_accept_header():
    for headers in ({"Accept": "image/jpeg", "X-Detect-Format": "json"}, {"accept": "image/png"}):
        row = {"body": IMAGE} if len(headers) == 2 else {"body": IMAGE, "format": bytearray(b"json")}
        assert parse(row, headers).output_format == "json"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Accept": "image/png"}, "png"),
        ({"X-Detect-Format": "png"}, "png"),
        ({"X-Detect-Format": "yolo"}, "yolo"),
    ],
)
def test_a_drawn_image_and_a_text_file_answer_a_request_of_one_image_only(headers, expected):
    instance = {"b64": IMAGE_BASE64}
    assert parse({"body": {"instances": [instance]}}, headers).output_format == expected
    error = refusal({"body": {"instances": [instance, instance]}}, headers)
    assert type(error) is InvalidOptionError
    assert f"format is {expected} for 2 images" in str(error)
    assert "json, coco, arrays, supervision" in str(error)


@pytest.mark.parametrize("output_format", ["json", "coco", "arrays", "supervision"])
def test_several_images_are_answered_in_the_formats_that_can_hold_them(output_format):
    document = {"instances": [{"b64": IMAGE_BASE64}] * 2, "format": output_format}
    assert parse({"body": document}).output_format == output_format


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(("text", "value"), [("0", 0), ("139", 139), (str(2**53), 2**53)])
def test_the_image_id_comes_through_every_channel(channel, text, value):
    assert channel("image_id", text, value).image_id == value


def test_an_image_has_the_id_zero_unless_another_is_given():
    assert parse({"body": IMAGE}).image_id == 0


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("text", "value"),
    [("-1", -1), ("1.0", 1.0), ("a.jpg", "7"), ("", True), (str(2**53 + 1), 2**53 + 1), ("1e3", [1])],
)
def test_an_image_id_that_is_no_whole_number_in_range_is_refused(channel, text, value):
    with pytest.raises(InvalidOptionError, match=r"image_id is .*; a whole number from 0 to"):
        channel("image_id", text, value)
