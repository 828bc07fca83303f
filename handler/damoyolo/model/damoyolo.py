"""DAMO-YOLO: backbone, neck and head in sequence (arXiv 2211.15444)."""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from torch import Tensor, nn

from damoyolo.model.backbone import build_backbone
from damoyolo.model.head import ZeroHead
from damoyolo.model.layers import LayerFactory
from damoyolo.model.neck import RepGfpn
from damoyolo.model.variants import VariantSpec
from damoyolo.structures import RawPredictions


class DamoYolo(nn.Module):
    """Pixels in, raw predictions of three levels out; no sigmoid, no box decoding, no NMS.

    variant, num_classes: what it was built for.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: nn.Module, variant: VariantSpec, num_classes: int
    ) -> None:
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck
        self.head = head

    def forward(self, images: Tensor) -> RawPredictions:
        """Predict for a batch.

        images: (B, 3, H, W), RGB, values 0..255, in the weights' floating-point type; H and W multiples
            of 32.
        """
        return self.head(self.neck(self.backbone(images)))


def build_model(variant: VariantSpec, num_classes: int, *, folded: bool = False) -> DamoYolo:
    """A network in evaluation mode with random weights, for a state dict to be loaded.

    folded: build the form of plain convolutions, for a state dict of `fold.fold_state_dict`; otherwise the
        form as trained, with the key names and order of the official checkpoints.
    """
    layers = LayerFactory(folded)
    model = DamoYolo(
        backbone=build_backbone(variant, layers),
        neck=RepGfpn(variant, layers),
        head=ZeroHead(variant, num_classes, layers),
        variant=variant,
        num_classes=num_classes,
    )
    return model.eval()
