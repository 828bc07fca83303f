"""Run the network in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from damoyolo.backends.precision import AUTOCAST_DTYPE, WEIGHT_DTYPE, resolve_precision
from damoyolo.structures import RawPredictions


class PyTorchBackend:
    """The network as it is, converted to one precision on one device.

    Call with (B, 3, H, W) uint8 RGB on the device; returns RawPredictions in the precision's dtype.
    """

    name = "pytorch"

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        self.device = device
        self.precision = resolve_precision(precision, device)
        self.weight_dtype = WEIGHT_DTYPE.get(self.precision, torch.float32)
        # Tensor cores and oneDNN need the channels innermost, or each convolution reorders its input.
        self.model = model.eval().to(device, self.weight_dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> RawPredictions:
        images = pixels.to(self.weight_dtype, memory_format=torch.channels_last)
        if self.device.type == "cuda":
            # Process-wide flags: set at each call, so that backends of both kinds can share a process, and
            # because importing TorchServe's BaseHandler switches TF32 on.
            torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
            torch.backends.cuda.matmul.allow_tf32 = self.precision != "fp32"
        with torch.autocast(
            self.device.type, AUTOCAST_DTYPE[self.device.type], enabled=self.precision == "amp"
        ):
            predictions: RawPredictions = self.model(images)
        return predictions
