"""Measure several servers in turn, for several rounds, and sum up what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib.cli import ScriptError
from lib.load.generator import generate_load
from lib.load.worker import Load
from lib.measure.compared_servers import SERVERS, Bench, RunningServer, Server
from lib.measure.reference_answers import Reference
from lib.measure.request_forms import RequestForm
from lib.measure.wrk import measure_by_wrk
from lib.server.local_http import direct_session
from lib.server.metrics import UtilisationSampler

Row = dict[str, Any]
GENERATOR, WRK = "generator", "wrk"


@dataclass(frozen=True)
class Plan:
    """base: its bodies are the images. names: servers in the order of the first round. wrk: its path."""

    base: Load
    concurrencies: Sequence[int]
    names: Sequence[str]
    rounds: int
    wrk: str | None = None


def measure_rounds(bench: Bench, plan: Plan, reference: Reference, report: Callable[[Row], None]) -> None:
    """Measure every server in each round; `report` gets each row at once.

    The order is reversed from round to round, so that a machine that becomes slower or faster, or what a
    server leaves behind, does not always affect the same ones.
    """
    for number in range(plan.rounds):
        for name in plan.names if number % 2 == 0 else reversed(plan.names):
            for row in _measure_server(SERVERS[name], bench, plan, reference):
                report({"server": name, "round": number, "network_per_s": reference.network_per_s, **row})


def _measure_server(server: Server, bench: Bench, plan: Plan, reference: Reference) -> Iterator[Row]:
    """One row for each load, or one that says why there is none."""
    try:
        with server.start(bench) as running:
            load = replace(plan.base, url=running.url)
            check: Row = {}
            if server.form is not None:
                check = _check(running, plan.base.bodies, server.form, reference)
                bodies = [server.form.body(image) for image in plan.base.bodies]
                load = replace(load, bodies=bodies, headers=server.form.headers)
            for connections in plan.concurrencies:
                common = {"connections": connections, "start_s": running.start_s, **check}
                yield from (
                    {**common, **row} for row in _measure_load(replace(load, connections=connections), plan)
                )
    except ScriptError as error:
        yield {"left_out": str(error).splitlines()[-1]}


def _check(running: RunningServer, images: Sequence[bytes], form: RequestForm, reference: Reference) -> Row:
    answers = []
    with direct_session() as session:
        for image in images:
            answer = session.post(
                running.url,
                form.body(image),
                headers=dict(form.headers) | {"Accept-Encoding": "identity"},
                timeout=60,
            )
            if answer.status_code != 200:
                raise ScriptError(f"status {answer.status_code} for an image: {answer.text[:200]}")
            headers = {name.lower(): value for name, value in answer.headers.items()}
            answers.append((headers, answer.content))
    return reference.check(answers, form)


def _measure_load(load: Load, plan: Plan) -> Iterator[Row]:
    with UtilisationSampler() as utilisation:
        result = generate_load(load)
    yield {
        "tool": GENERATOR,
        **result.row(),
        "gpu_percent": utilisation.gpu_percent(result.window_s),
        "busy_cores": utilisation.busy_cores(result.window_s),
    }
    if plan.wrk is not None:
        yield {"tool": WRK, **measure_by_wrk(plan.wrk, load)}


def summarised(rows: Sequence[Row]) -> list[Row]:
    """One row for each server and number of connections, over all rounds, in the order of the first round."""
    summary = []
    for name, connections in dict.fromkeys((row["server"], row.get("connections")) for row in rows):
        of_both = [row for row in rows if row["server"] == name and row.get("connections") == connections]
        own = [row for row in of_both if row.get("tool") == GENERATOR]
        if not own:
            summary.append({"server": name, "left_out": of_both[0]["left_out"]})
            continue
        rates = [row["requests_per_s"] for row in own]
        by_wrk = [row["requests_per_s"] for row in of_both if row.get("tool") == WRK]
        summary.append(
            {
                "server": name,
                "connections": connections,
                "rounds": len(own),
                "images_per_s": statistics.median(rates),
                "lowest_per_s": min(rates),
                "highest_per_s": max(rates),
                **{
                    key: _median(own, key)
                    for key in ("p50_ms", "p99_ms", "start_s", "gpu_percent", "busy_cores")
                },
                "wrk_per_s": statistics.median(by_wrk) if by_wrk else None,
                "errors": sum(row["errors"] for row in of_both),
                "checked": own[0].get("checked"),
                "equal": min((row["equal"] for row in own if "equal" in row), default=None),
                "wrong": max((len(row["wrong"]) for row in own if "wrong" in row), default=None),
                "of_network": _of_network(own) if SERVERS[name].form else None,
                "generator_busy_share": max(row["generator_busy_share"] for row in own),
            }
        )
    return summary


def _of_network(rows: Sequence[Row]) -> float:
    """Of the network alone, as measured in the same run: the machine may have been slower in another."""
    return float(statistics.median(row["requests_per_s"] / row["network_per_s"] for row in rows))


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def markdown_table(summary: Sequence[Row]) -> str:
    """The summary as a table in Markdown."""
    heads = "server|clients|images/s (range)|of the network|wrk: images/s|p50, p99 ms|errors|answers|cores"
    heads += "|start, s"
    lines = [f"| {heads.replace('|', ' | ')} |", "|" + "---|" * (heads.count("|") + 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in summary if "left_out" not in row]
    lines += [
        f"\n{SERVERS[row['server']].title} is left out: {row['left_out']}"
        for row in summary
        if "left_out" in row
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        SERVERS[row["server"]].title,
        str(row["connections"]),
        f"{row['images_per_s']:,.1f} ({row['lowest_per_s']:,.1f} to {row['highest_per_s']:,.1f})",
        _shown(row["of_network"], ".0%"),
        _shown(row["wrk_per_s"], ",.1f"),
        f"{_shown(row['p50_ms'], '.1f')}, {_shown(row['p99_ms'], '.1f')}",
        str(row["errors"]),
        _answers(row),
        _shown(row["busy_cores"], ".1f"),
        _shown(row["start_s"], ".1f"),
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _answers(row: Row) -> str:
    if row["wrong"] is None:
        return "-"
    if row["wrong"]:
        return f"{row['wrong']} wrong"
    return "equal" if row["equal"] == row["checked"] else "right"
