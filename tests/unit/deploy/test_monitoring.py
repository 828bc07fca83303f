"""deploy/monitoring and docs/monitoring.md name the metrics that exist."""

import re
import shutil
import subprocess

import pytest
import yaml

from damoyolo.metrics import COUNTERS, GAUGES, HISTOGRAMS
from doubles.monitoring import read_annotations, read_panels, without_threshold

REPORTED = COUNTERS.keys() | HISTOGRAMS.keys() | GAUGES.keys()
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)"
)


@pytest.fixture(scope="module")
def monitoring_dir(project_dir):
    return project_dir / "deploy" / "monitoring"


@pytest.fixture(scope="module")
def java_dir(project_dir):
    return project_dir / "deploy/front-end/src/damoyolo/frontend"


@pytest.fixture(scope="module")
def known(java_dir):
    """The names of all metrics: of the workers and of the server."""
    measured = re.findall(r'"(damoyolo_\w+)"', (java_dir / "ServerMetrics.java").read_text())
    assert len(measured) == len(set(measured)) == 8
    return REPORTED | set(measured)


def metrics_in(text):
    names = set(re.findall(r"damoyolo_\w+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def test_the_page_explains_every_metric_of_the_workers(java_dir):
    text = (java_dir / "WorkerMetrics.java").read_text()
    assert set(re.findall(r'Map\.entry\("(damoyolo_\w+)"', text)) == REPORTED


def test_dashboard_and_rules_name_metrics_that_exist(monitoring_dir, known):
    for name in ("dashboard.json", "rules.yml", "rules_test.yml"):
        assert metrics_in((monitoring_dir / name).read_text()) <= known


def test_the_documentation_describes_every_metric(project_dir, known):
    rows = re.findall(r"^\| `(damoyolo_\w+)`", (project_dir / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(known)


def test_the_documentation_names_every_alert(project_dir, monitoring_dir):
    rules = yaml.safe_load((monitoring_dir / "rules.yml").read_text())["groups"][0]["rules"]
    text = (project_dir / "docs/monitoring.md").read_text()
    assert all(f"`{rule['alert']}`" in text for rule in rules)


def test_every_alert_has_a_unit_test(monitoring_dir):
    rules = yaml.safe_load((monitoring_dir / "rules.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((monitoring_dir / "rules_test.yml").read_text())["tests"]
    firing = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert firing == {rule["alert"] for rule in rules}


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
)
def test_promtool_accepts_the_files(monitoring_dir, arguments):
    checked = subprocess.run(
        ["promtool", *arguments], cwd=monitoring_dir, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_variables_are_filled_in_everywhere(monitoring_dir):
    panels = read_panels(monitoring_dir / "dashboard.json")
    assert len(panels) > 10
    assert all(targets for _, _, targets in panels)
    assert read_annotations(monitoring_dir / "dashboard.json")


def test_a_threshold_is_taken_off_and_a_ratio_stays():
    assert without_threshold("sum(a) / sum(b) > 0.01") == "sum(a) / sum(b)"
    assert without_threshold("a\n  < on (x) b") == "a"
    assert without_threshold('up{job="x"} == 0') == 'up{job="x"}'
