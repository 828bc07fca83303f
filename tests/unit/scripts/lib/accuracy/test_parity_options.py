"""The comparison as commands offer it: which tolerances and which evidence."""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.accuracy.parity_options import add_parity_arguments, check_parity, chosen_tolerances, read_evidence
from lib.accuracy.tolerances import TOLERANCES
from lib.cli import ScriptError


def parse(*words):
    parser = argparse.ArgumentParser()
    add_parity_arguments(parser)
    return parser.parse_args(words)


def test_tolerances_are_those_of_the_precision_unless_given():
    changed = chosen_tolerances(parse("--box-px-tolerance", "3"), "fp16")
    assert changed == dataclasses.replace(TOLERANCES["fp16"], box_px=3.0)


def test_an_int8_backend_needs_a_data_set(monkeypatch):
    closed = []
    pair = [
        SimpleNamespace(
            pipeline=SimpleNamespace(precision="int8"), close=lambda name=name: closed.append(name)
        )
        for name in ("reference", "candidate")
    ]
    monkeypatch.setattr("lib.accuracy.parity.load_pair", lambda *_: pair)
    arguments = parse()
    with pytest.raises(ScriptError, match="give a data set"):
        check_parity(Path("a.mar"), torch.device("cpu"), [1], arguments, read_evidence(arguments))
    assert closed == ["reference", "candidate"]
