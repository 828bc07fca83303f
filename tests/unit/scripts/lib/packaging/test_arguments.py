"""The options with which commands name a network."""

import pytest

from lib.cli import command_parser
from lib.packaging.arguments import add_network_arguments, load_network
from lib.packaging.class_names import DEMO_CLASS_NAMES

from damoyolo.errors import CheckpointError


def test_without_options_it_is_the_demo_network_and_names_must_fit(tmp_path):
    parser = command_parser(None)
    add_network_arguments(parser)
    model, class_names = load_network(parser.parse_args([]))
    assert class_names == DEMO_CLASS_NAMES
    assert (model.variant.name, model.num_classes) == ("S", 3)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(CheckpointError, match="3 classes, but 4 class names"):
        load_network(parser.parse_args(["--class-names", str(tmp_path / "names.txt")]))
