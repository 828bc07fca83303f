"""A real Prometheus for tests, the expressions of deploy/monitoring, and a picture of the dashboard."""

import contextlib
import json
import re
import shutil
import subprocess
import time

import requests
import yaml

from lib.server.process import free_ports

from doubles.real_server import wait_until

RANGE = "10s"  # what Grafana puts in place of $__rate_interval; ten scrapes
DRAWN_S = 60  # the time that a picture shows


class Prometheus:
    """The HTTP API of a running Prometheus.

    ended_at: the end of the time that `query_range` asks for; None for now.
    """

    def __init__(self, url):
        self.url = url
        self.ended_at = None

    def _get(self, path, **parameters):
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression):
        """The series of an instant query, each {"metric": labels, "value": [time, text]}."""
        return self._get("query", query=expression)["result"]

    def query_range(self, expression, seconds=DRAWN_S):
        """The series of the last seconds, each {"metric": labels, "values": [[time, text], ...]}."""
        end = self.ended_at or time.time()
        return self._get("query_range", query=expression, start=end - seconds, end=end, step="1s")["result"]

    def rules(self):
        """The rules with their state and health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def running_prometheus(monitoring_dir, folder, metrics_url):
    """Scrapes a server once a second, with the configuration and rules of a folder otherwise.

    metrics_url: of the server; None leaves the targets of the configuration.
    """
    config = yaml.safe_load((monitoring_dir / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(monitoring_dir / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    if metrics_url:
        job["static_configs"] = [{"targets": [metrics_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [shutil.which("prometheus"), f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}", "--log.level=warn"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://{address}")

    def is_scraping():
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with contextlib.suppress(requests.RequestException):
            return prometheus.query("up == 1") != []
        return False

    try:
        wait_until(is_scraping, "Prometheus reading the server's metrics", 30)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def read_panels(dashboard):
    """The panels of a dashboard's file that show data: title, unit, and (expression, legend) of each line."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [
        (
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            [(fill_in(target["expr"]), target["legendFormat"]) for target in panel["targets"]],
        )
        for panel in panels
        if panel["type"] != "row"
    ]


def read_annotations(dashboard):
    """The expressions of a dashboard's annotations."""
    return [fill_in(each["expr"]) for each in json.loads(dashboard.read_text())["annotations"]["list"]]


def fill_in(expression):
    """An expression with values in place of Grafana's variables."""
    filled = expression.replace("$__rate_interval", RANGE)
    filled = re.sub(r"\$(instance|model_name)\b", ".*", filled)
    assert "$" not in filled, filled
    return filled


def without_threshold(expression):
    """What an alert compares; `up` and the like are there whether the alert fires or not."""
    return re.split(r"\s(?:==|>|<)\s(?!=)", " ".join(expression.split()))[0]


def legend(template, labels):
    """Grafana's legend of a series."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template)


def draw_dashboard(prometheus, dashboard, path):
    """Draw the panels that have data into a PNG, four in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for title, unit, targets in read_panels(dashboard):
        series = [
            (legend(template, found["metric"]), [(at, float(value)) for at, value in found["values"]])
            for expression, template in targets
            for found in prometheus.query_range(expression)
        ]
        grown = [(name, points) for name, points in series if any(value for _, value in points)]
        if series:
            drawn.append((title, unit, grown or series))
    rows = -(-len(drawn) // 4)
    figure, grid = pyplot.subplots(rows, 4, figsize=(17, 2.9 * rows), layout="constrained", squeeze=False)
    end = prometheus.ended_at or time.time()
    for axes, (title, unit, series) in zip(grid.flat, drawn, strict=False):
        for name, points in series:
            times, values = zip(*points, strict=True)
            axes.plot([at - end for at in times], values, label=name, linewidth=1.5)
        unit = unit.removeprefix("suffix: ").replace("reqps", "requests/s").replace("short", "")
        axes.set_title(f"{title}, {unit}" if unit else title, fontsize=10)
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", ncols=3, framealpha=0.6)
    for axes in list(grid.flat)[len(drawn) :]:
        axes.axis("off")
    figure.supxlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=65)
    pyplot.close(figure)
