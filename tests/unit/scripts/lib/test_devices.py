"""The device of a command."""

import pytest
import torch

from lib.cli import ScriptError
from lib.devices import open_device


def test_the_cpu_is_always_there_and_the_default_is_a_gpu_if_there_is_one():
    assert open_device("cpu") == torch.device("cpu")
    assert open_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "foo", "meta", "cuda:x", "cpu\n", "cuda:999"])
def test_another_device_is_refused_with_what_is_accepted_or_there(name):
    with pytest.raises(ScriptError, match=r"accepted are cpu|PyTorch finds"):
        open_device(name)
