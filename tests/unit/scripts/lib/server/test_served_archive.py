import pytest

from lib.cli import ScriptError
from lib.server.served_archive import ServedModel

from doubles.stand_in_server import StandInModel


def test_scaling_returns_when_all_workers_are_ready():
    with StandInModel() as model:
        served = ServedModel(model.base_url, model.base_url, model.base_url, "m")
        served.scale(3)
        assert served.batching() == {"batch_size": 4, "delay_ms": 2, "workers": 3, "workers_per_gpu": {}}
        model.worker_status = "UNLOADING"
        with pytest.raises(ScriptError, match="UNLOADING"):
            served.scale(2, timeout_s=0.3)
