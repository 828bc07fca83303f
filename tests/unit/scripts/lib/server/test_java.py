import pytest

from lib.server.java import java_version


@pytest.mark.parametrize("version_text", ['openjdk version "17.0.15"', 'java version "1.8.0_401"'])
def test_the_version_of_a_java_program_is_understood(tmp_path, version_text):
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\necho '{version_text}' >&2\n")
    program.chmod(0o755)
    assert java_version(program) == (17 if "17" in version_text else 8)
    assert java_version(tmp_path / "nothing") == 0
