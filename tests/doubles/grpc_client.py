"""Calls of TorchServe's gRPC inference service, with messages encoded by hand instead of generated stubs."""

import grpc

SERVICE = "org.pytorch.serve.grpc.inference.InferenceAPIsService"
WIRE_BYTES = 2  # the wire type of strings, bytes, messages and map entries


def _varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _field(number, content):
    return _varint(number << 3 | WIRE_BYTES) + _varint(len(content)) + content


def predictions_request(model_name, fields):
    """A PredictionsRequest: model_name = 1, map<string, bytes> input = 3."""
    entries = [_field(3, _field(1, name.encode()) + _field(2, value)) for name, value in fields.items()]
    return _field(1, model_name.encode()) + b"".join(entries)


def register_model(port, **fields):
    """Call RegisterModel of the management service with these text fields; the answer is not decoded."""
    numbers = {"handler": 2, "model_name": 5, "url": 9}
    request = b"".join(_field(numbers[name], value.encode()) for name, value in fields.items())
    method = "/org.pytorch.serve.grpc.management.ManagementAPIsService/RegisterModel"
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        return channel.unary_unary(method)(request, 60.0)


def prediction_of(response):
    """The content of a PredictionResponse: bytes prediction = 1, its only field here."""
    if not response:
        return b""
    assert response[0] == 1 << 3 | WIRE_BYTES
    start = next(index for index in range(1, len(response)) if response[index] < 128) + 1
    return response[start:]


def call(port, method, request, metadata=(), timeout_s=60.0):
    """The answers of Predictions or StreamPredictions.

    Raises:
        grpc.RpcError: the call ended with another status than OK.
    """
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        if method == "Predictions":
            return [prediction_of(channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout_s, metadata))]
        if method == "StreamPredictions":
            answers = channel.unary_stream(f"/{SERVICE}/{method}")(request, timeout_s, metadata)
        else:
            answers = channel.stream_stream(f"/{SERVICE}/{method}")(iter([request]), timeout_s, metadata)
        return [prediction_of(answer) for answer in answers]
