"""The pinned packages satisfy the minimum versions of pyproject.toml, which are partly there for safety."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT_DIR = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def minimums():
    """The requirements of the client and the server; read as text, because Python 3.10 has no tomllib."""
    text = (PROJECT_DIR / "pyproject.toml").read_text()
    blocks = [
        re.search(rf"(?ms)^{name} = \[$(.*?)^\]$", text).group(1) for name in ("dependencies", "server")
    ]
    return [
        Requirement(quoted) for block in blocks for quoted in re.findall(r'^ +"(.+)",$', block, re.MULTILINE)
    ]


def pins(name, python):
    """The versions that a requirements file installs with this Python on Linux x86-64, by package."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    lines = (PROJECT_DIR / name).read_text().splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        each.name.lower(): next(iter(each.specifier)).version
        for each in required
        if each.marker is None or each.marker.evaluate(environment)
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_pins_satisfy_the_minimum_versions(name, python):
    pinned = pins(name, python)
    required = [
        each for each in minimums() if each.marker is None or each.marker.evaluate({"python_version": python})
    ]
    assert {"pillow", "requests", "torch", "urllib3"} <= {each.name for each in required}
    below = [f"{each}: {pinned[each.name]}" for each in required if pinned[each.name] not in each.specifier]
    assert below == []
