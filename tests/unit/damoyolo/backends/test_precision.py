"""Precisions: which are accepted where, and that each stays near float32."""

import copy

import pytest
import torch

from damoyolo.backends import precision as precisions
from damoyolo.backends.precision import PRECISIONS_OF_DEVICE, resolve_precision
from damoyolo.backends.pytorch import PyTorchBackend
from damoyolo.boxes import decode_predictions
from damoyolo.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Largest difference of a score from float32, for logits of an untrained network.
SCORE_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "amp": 2e-2, "fp16": 2e-3, "bf16": 2e-2}


def pixels(device):
    """(2, 3, 96, 128) uint8."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator).to(device)


def check_precision(model, device, precision):
    reference = decode_predictions(model(pixels(CPU).float()))
    backend = PyTorchBackend(copy.deepcopy(model), device, precision)
    scores, boxes_xyxy = decode_predictions(backend(pixels(device)))
    assert scores.dtype == boxes_xyxy.dtype == torch.float32
    tolerance = SCORE_TOLERANCE[precision]
    torch.testing.assert_close(scores.cpu(), reference[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(boxes_xyxy.cpu(), reference[1], rtol=0, atol=50 * tolerance)


@pytest.mark.parametrize("precision", PRECISIONS_OF_DEVICE["cpu"])
def test_every_precision_of_a_cpu_stays_near_float32(network, precision):
    check_precision(network, CPU, precision)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS_OF_DEVICE["cuda"])
def test_every_precision_of_a_gpu_stays_near_float32(network, precision):
    check_precision(network, CUDA, precision)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_precision_that_a_cpu_lacks_is_refused_with_those_it_has(precision):
    with pytest.raises(ConfigError, match=rf"'{precision}'; accepted on cpu are auto, fp32, amp, bf16"):
        resolve_precision(precision, CPU)


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_only_where_the_cpu_computes_it(monkeypatch, in_hardware, expected):
    monkeypatch.setattr(precisions, "cpu_computes_bf16", lambda: in_hardware)
    assert resolve_precision("auto", CPU) == expected


def test_auto_takes_fp16_on_cuda():
    assert resolve_precision("auto", CUDA) == "fp16"


def test_another_kind_of_device_is_refused():
    with pytest.raises(ConfigError, match="cpu and cuda"):
        resolve_precision("auto", torch.device("meta"))
