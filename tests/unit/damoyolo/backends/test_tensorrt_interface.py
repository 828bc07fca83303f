"""The stand-in for TensorRT has nothing that the real module lacks; runs where TensorRT is installed."""

from __future__ import annotations

import pytest

from doubles import fake_tensorrt as fake_tensorrt


def test_the_stand_in_has_nothing_that_the_real_module_lacks() -> None:
    tensorrt = pytest.importorskip("tensorrt")
    missing = [
        (name, attribute)
        for name, attribute in fake_tensorrt.public_names()
        if not hasattr(tensorrt, name)
        or (attribute is not None and not hasattr(getattr(tensorrt, name), attribute))
    ]
    assert missing == []
    assert hasattr(tensorrt, "__version__")
