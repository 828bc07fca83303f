"""Blocks whose formula the checkpoints' keys and shapes say nothing about."""

import torch
from torch import nn
from torch.nn import functional as F

from damoyolo.model.layers import Focus, LayerFactory, SpatialPyramidPooling


def test_focus_orders_the_grids_by_column_then_row():
    focus = Focus(12, nn.Identity, LayerFactory(folded=True))
    with torch.no_grad():
        for parameter in focus.parameters():
            parameter.zero_()
        focus.conv.conv.weight[:, :, 1, 1] = torch.eye(12)
        pixels = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).expand(1, 3, 2, 2)
        assert focus(pixels).flatten().tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_pyramid_pooling_takes_maxima_over_5_9_and_13_pixels():
    torch.manual_seed(0)
    pooling = SpatialPyramidPooling(8, LayerFactory(folded=True)).eval()
    x = torch.randn(2, 8, 20, 17)
    with torch.no_grad():
        y = pooling.conv1(x)
        windows = [F.max_pool2d(y, size, 1, size // 2) for size in (5, 9, 13)]
        expected = pooling.conv2(torch.cat([y, *windows], dim=1))
        assert torch.equal(pooling(x), expected)


def test_a_norm_as_trained_has_the_epsilon_of_the_published_networks():
    norm = LayerFactory(folded=False).norm(4)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.eps == 1e-3
