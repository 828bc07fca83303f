"""Talk to a server with KServe's own client, protocols v1 and v2, and print what it says as JSON.

kserve_client.py URL MODEL IMAGE...
"""

import asyncio
import base64
import importlib.metadata
import json
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

TIMEOUT_S = 60.0


def client_of(protocol):
    return InferenceRESTClient(RESTConfig(protocol=protocol, timeout=TIMEOUT_S))


def request_of(model, images, binary, **more):
    """A request of the protocol v2: the images as binary data, or base64 in JSON."""
    elements = images if binary else [base64.b64encode(image) for image in images]
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, dtype=object), binary_data=binary)
    return InferRequest(model, [tensor], **more)


def values_of(response):
    """The tensors of an answer as lists, and its id."""
    values = {"id": response.id, "model_name": response.model_name}
    for output in response.outputs:
        items = output.as_numpy().tolist()
        values[output.name] = [item.decode() if isinstance(item, bytes) else item for item in items]
    return values


async def error_of(call):
    """Status and message of a call that fails."""
    try:
        await call
    except httpx.HTTPStatusError as error:
        return [error.response.status_code, error.response.json(), str(error)]
    return None


async def talk_v2(url, model, images):
    """Questions and predictions of the protocol v2."""
    async with client_of("v2") as client:
        json_request = request_of(model, images, False, request_id="x")
        binary = request_of(model, images, True, parameters={"binary_data_output": True})
        outputs = [RequestedOutput("labels", {"binary_data": True}), RequestedOutput("counts")]
        subset = request_of(model, images[:1], True, request_outputs=outputs)
        options = request_of(
            model, images[:1], True, parameters={"score_threshold": "0.6", "max_detections": 3}
        )
        corrupt = request_of(model, [images[0][:200]], True)
        many = [request_of(model, images[: 1 + index % 2], index % 3 != 0) for index in range(8)]
        return {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": await client.is_model_ready(url, model),
            "unknown_ready": await client.is_model_ready(url, "unknown"),
            "json": values_of(await client.infer(url, json_request, model)),
            "binary": values_of(await client.infer(url, binary, model)),
            "subset": values_of(await client.infer(url, subset, model)),
            "options": values_of(await client.infer(url, options, model)),
            "concurrent": [
                values_of(each)
                for each in await asyncio.gather(*(client.infer(url, request, model) for request in many))
            ],
            "corrupt": await error_of(client.infer(url, corrupt, model)),
            "unknown": await error_of(client.infer(url, binary, "unknown")),
        }


async def talk_v1(url, model, images):
    """Questions and predictions of the protocol v1."""
    texts = [base64.b64encode(image).decode() for image in images]
    async with client_of("v1") as client:
        forms = {
            "instances": {"instances": [{"b64": text} for text in texts]},
            "image": {"instances": [{"image": {"b64": text}} for text in texts]},
            "data": {"instances": [{"data": text} for text in texts]},
            "single": {"image": {"b64": texts[0]}},
            "torchserve": {"data": texts[0]},
            "options": {"instances": [{"b64": texts[0]}], "score_threshold": 0.6, "max_detections": 3},
        }
        answers = {name: await client.infer(url, form, model) for name, form in forms.items()}
        corrupt = {"instances": [{"b64": texts[0][:400]}]}
        return answers | {
            "model_ready": await client.is_model_ready(url, model),
            "unknown_ready": await error_of(client.is_model_ready(url, "unknown")),
            "corrupt": await error_of(client.infer(url, corrupt, model)),
            "unknown": await error_of(client.infer(url, corrupt, "unknown")),
        }


async def talk(url, model, images):
    return {
        "client": f"kserve {importlib.metadata.version('kserve')}",
        "v2": await talk_v2(url, model, images),
        "v1": await talk_v1(url, model, images),
    }


def main():
    """Print one JSON document."""
    url, model, *paths = sys.argv[1:]
    print(json.dumps(asyncio.run(talk(url, model, [Path(path).read_bytes() for path in paths]))))


if __name__ == "__main__":
    main()
