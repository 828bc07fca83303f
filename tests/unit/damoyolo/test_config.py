"""Serving settings: refusals, round trip, and the batch sizes that are captured."""

import re

import pytest
import yaml

from damoyolo.config import ServingConfig, graph_batch_sizes_up_to
from damoyolo.errors import ConfigError


def test_the_mapping_of_a_config_gives_the_same_config_back():
    config = ServingConfig.from_mapping(
        {"class_names": ["a", "b"], "input_size_hw": [320, 640], "score_threshold": 1, "precision": "bf16"}
        | {"class_colours": ["#00FF7f"]}
    )
    assert config.input_size_hw == (320, 640)
    assert config.score_threshold == 1.0
    assert ServingConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({"treshold": 0.5}, "score_threshold"),
        ({"device_wait": "sleep"}, "cuda_sync (and its value sleep is now blocking)"),
        ({"cuda_sync": "sleep"}, "auto, blocking, spin"),
        ({"score_threshold": "0.5"}, "float"),
        ({"score_threshold": 1.5}, "0.0 to 1.0"),
        ({"score_threshold": float("nan")}, "0.0 to 1.0"),
        ({"max_detections": True}, "int"),
        ({"max_detections": 5000}, "1 to 1000"),
        ({"max_detections": 10, "max_detections_limit": 5}, "1 to 5"),
        ({"class_names": "person"}, "list"),
        ({"class_names": ["a", 1]}, "str"),
        ({"class_names": ["a", "a"]}, "twice"),
        ({"input_size_hw": [640]}, "2 are needed"),
        ({"input_size_hw": [640, 650]}, "multiples of 32"),
        ({"precision": "int4"}, "fp16"),
        ({"image_formats": ["SVG"]}, "JPEG"),
        ({"warmup_batch_sizes": [0]}, "1 to 1024"),
        ({"class_colours": ["red"]}, "#RRGGBB"),
        ({"class_colours": ["#12345"]}, "#RRGGBB"),
        ({"class_colours": ["#12345g"]}, "#RRGGBB"),
        ({"class_colours": ["#112233\n"]}, "#RRGGBB"),
        ({"class_colours": "#112233"}, "list"),
        ({"class_colours": [None]}, "needs quotes"),  # what `- #112233` is in YAML
        ({"class_colours": ["#112233"] * 2, "class_names": ["a"]}, "2 colours for 1 classes"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_accepted(settings, mentions):
    with pytest.raises(ConfigError, match=next(iter(settings))) as raised:
        ServingConfig.from_mapping(settings)
    assert mentions in str(raised.value)


def test_the_documented_colours_are_accepted(project_dir):
    text = (project_dir / "docs/output-formats.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    config = ServingConfig.from_mapping(yaml.safe_load(block)["handler"])
    assert config.class_colours[0] == "#E69F00"


def test_a_request_without_options_gets_the_settings():
    options = ServingConfig(score_threshold=0.3, iou_threshold=0.6, max_detections=7).default_options()
    assert (options.score_threshold, options.iou_threshold, options.max_detections) == (0.3, 0.6, 7)
    assert options.class_ids is None
    assert not options.class_agnostic


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (32, [1, 2, 4, 8, 12, 16, 20, 24, 32]),
        (100, [1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 100]),
    ],
)
def test_the_captured_batch_sizes_end_with_the_largest(largest, sizes):
    assert graph_batch_sizes_up_to(largest) == sizes
