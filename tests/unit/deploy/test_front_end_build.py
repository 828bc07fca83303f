"""The checked-in jar of deploy/front-end is what its sources compile to."""

import importlib.util
import zipfile

import pytest


@pytest.fixture(scope="module")
def build(project_dir):
    """deploy/front-end/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build", project_dir / "deploy/front-end/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_jar_was_built_from_these_sources(build):
    assert build.read_manifest(build.JAR)["Sources-Digest"] == build.sources_digest()


def test_a_rebuild_gives_the_same_bytes(build, tmp_path):
    javac = build.find_javac()
    if javac is None:
        pytest.skip("no javac on this machine")
    compiler, found = build.read_manifest(build.JAR)["Compiler"], build.javac_version(javac)
    if compiler != f"javac {found}":
        pytest.skip(f"the jar was built by {compiler}, here is javac {found}: class files may differ")
    build.build(tmp_path / "front-end.jar", javac)
    assert (tmp_path / "front-end.jar").read_bytes() == build.JAR.read_bytes()


def test_the_jar_names_its_entry_point(build):
    with zipfile.ZipFile(build.JAR) as jar:
        assert jar.read(build.SERVICE).decode().split() == ["damoyolo.frontend.FrontEnd"]
        assert "damoyolo/frontend/FrontEnd.class" in jar.namelist()
