"""Talk to a Triton server with tritonclient.http and tritonclient.grpc and print what it says as JSON.

triton_server_client.py HTTP_ADDRESS GRPC_ADDRESS MODEL IMAGE... (an address is HOST:PORT)
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

OUTPUTS = ("answer", "counts", "boxes", "scores", "class_ids", "labels")
REQUESTS = 24
TIMEOUT_S = 60.0


class Caller:
    """One of the two clients with one model: the calls are the same."""

    def __init__(self, library, client, model):
        self.library, self.client, self.model = library, client, model

    def tensor(self, images, datatype="BYTES"):
        """The input, as binary data."""
        values = np.array(images, dtype=object).reshape(len(images), 1)
        if datatype != "BYTES":
            values = np.zeros((1, 1), np.uint8)
        made = self.library.InferInput("image", list(values.shape), datatype)
        made.set_data_from_numpy(values)
        return [made]

    def outputs(self, names, **options):
        """What is asked for."""
        return [self.library.InferRequestedOutput(name, **options) for name in names]

    def infer(self, images, **options):
        """The tensors of the answer as lists."""
        return values_of(self.client.infer(self.model, self.tensor(images), **options))

    def error(self, model=None, inputs=None, **options):
        """Status and message of a request that fails."""
        try:
            self.client.infer(model or self.model, inputs, **options)
        except InferenceServerException as error:
            return [error.status(), error.message()]
        return None


def values_of(result):
    """The tensors of an answer as lists."""
    found = {name: result.as_numpy(name) for name in OUTPUTS}
    return {
        name: [
            [item.decode() if isinstance(item, bytes) else item for item in row] for row in tensor.tolist()
        ]
        for name, tensor in found.items()
        if tensor is not None
    }


def predictions(caller, images):
    """One request of each form."""
    options = {"score_threshold": 0.6, "classes": "RBC", "max_detections": 3, "class_agnostic": True}
    return {
        "one": caller.infer(images[:1]),
        "several": caller.infer(images, request_id="a b"),
        "subset": caller.infer(images[:1], outputs=caller.outputs(["labels", "counts"])),
        "answer": caller.infer(images[:1], outputs=caller.outputs(["answer"])),
        "options": caller.infer(images[:1], parameters=options),
        "texts": caller.infer(images[:1], parameters={name: str(value) for name, value in options.items()}),
        "nothing": caller.infer(images[:1], parameters={"score_threshold": 1}),
        "coco": caller.infer(images[:1], parameters={"format": "coco"}, outputs=caller.outputs(["answer"])),
        "version": caller.infer(images[:1], model_version="1"),
    }


def errors(caller, images):
    """Requests that cannot be answered."""
    good = caller.tensor(images[:1])
    named = caller.library.InferInput("picture", [1, 1], "BYTES")
    named.set_data_from_numpy(np.array([[b"x"]], dtype=object))
    return {
        "no image": caller.error(inputs=caller.tensor([b"no image"])),
        "corrupt": caller.error(inputs=caller.tensor([images[0], images[0][:200]])),
        "empty": caller.error(inputs=caller.tensor([b""])),
        "option": caller.error(inputs=good, parameters={"score_threshold": 2}),
        "unknown option": caller.error(inputs=good, parameters={"treshold": 0.5}),
        "class": caller.error(inputs=good, parameters={"classes": "cat"}),
        "pixels": caller.error(inputs=caller.tensor([], "UINT8")),
        "input": caller.error(inputs=[named]),
        "output": caller.error(inputs=good, outputs=caller.outputs(["masks"])),
        "images": caller.error(inputs=caller.tensor(images[:1] * 65)),
        "model": caller.error(inputs=good, model="unknown"),
        "version": caller.error(inputs=good, model_version="7"),
    }


def concurrent(caller, images):
    """Many requests at once, each with its own image and options; every sixth one has no image."""
    pending = []
    for index in range(REQUESTS):
        image = b"no image" if index % 6 == 5 else images[index % len(images)]
        options = {"max_detections": 1 + index % 4}
        pending.append(caller.client.async_infer(caller.model, caller.tensor([image]), parameters=options))
    found = []
    for each in pending:
        try:
            found.append(values_of(each.get_result(timeout=TIMEOUT_S)))
        except InferenceServerException as error:
            found.append([error.status(), error.message()])
    return found


def main():
    """Print one JSON document."""
    http_address, grpc_address, model, *paths = sys.argv[1:]
    images = [Path(path).read_bytes() for path in paths]
    http = tritonclient.http.InferenceServerClient(
        http_address, concurrency=REQUESTS, connection_timeout=TIMEOUT_S, network_timeout=TIMEOUT_S
    )
    grpc = tritonclient.grpc.InferenceServerClient(grpc_address)
    callers = {
        "http": Caller(tritonclient.http, http, model),
        "grpc": Caller(tritonclient.grpc, grpc, model),
    }
    found = {
        "client": f"tritonclient {importlib.metadata.version('tritonclient')}",
        "ready": [http.is_server_live(), http.is_server_ready(), http.is_model_ready(model)],
        "unknown_ready": http.is_model_ready("unknown"),
        "metadata": http.get_model_metadata(model),
        "config": http.get_model_config(model),
        "grpc_ready": grpc.is_server_ready() and grpc.is_model_ready(model),
        "predictions": {name: predictions(caller, images) for name, caller in callers.items()},
        "errors": {name: errors(caller, images) for name, caller in callers.items()},
    }
    found["before"] = http.get_inference_statistics(model)
    found["concurrent"] = concurrent(callers["http"], images)
    found["after"] = http.get_inference_statistics(model)
    http.close()
    grpc.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
