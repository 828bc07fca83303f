"""Let the stem of a folded network read pixels as they are: Focus becomes part of its convolution."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from damoyolo.model.damoyolo import DamoYolo
from damoyolo.model.layers import Focus


def focus_weight_on_pixels(weight: Tensor) -> Tensor:
    """The weight (O, 3, 6, 6) on pixels that equals a 3x3 convolution of the grids of Focus.

    Stride 1 and padding 1 in cells of 2x2 pixels are stride 2 and padding 2 in pixels.
    Channel (x * 2 + y) * 3 + c of the grids is colour c of the pixel in row y, column x of a cell.
    """
    cells = weight.view(-1, 2, 2, 3, 3, 3)  # O,12,3,3 -> O,x,y,c,i,j for row i, column j of cells
    return cells.permute(0, 3, 4, 2, 5, 1).reshape(-1, 3, 6, 6)  # O,c,(i,y),(j,x)


def join_focus(model: DamoYolo) -> DamoYolo:
    """Replace Focus and its 3x3 convolution, where the network has them, by one 6x6 convolution of stride 2.

    For backends that are slow at strided copies of pixels (OpenVINO: six copies, 2 ms of S at 640x640). The
    convolution keeps its name. model: folded; changed in place, and returned.
    """
    blocks = next(model.backbone.children())
    assert isinstance(blocks, nn.ModuleList)
    focus = blocks[0]
    if isinstance(focus, Focus):
        conv = focus.conv.conv
        conv.weight = nn.Parameter(focus_weight_on_pixels(conv.weight.detach()).contiguous(), False)
        conv.in_channels, conv.kernel_size, conv.stride, conv.padding = 3, (6, 6), (2, 2), (2, 2)
        blocks[0] = nn.Sequential(OrderedDict(conv=focus.conv))
    return model
