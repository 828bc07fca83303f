import json

import pytest

from lib.measure.timeline import Span, device_kind, draw_timeline, read_trace


def write_trace(path, base_ns=10_000_000):
    def event(name, category, start_us, duration_us, **args):
        return {"ph": "X", "name": name, "cat": category, "ts": start_us, "dur": duration_us, "args": args}

    events = [
        event("batch", "user_annotation", 0, 9000),
        event("preprocess", "user_annotation", 0, 2000),
        event("network", "user_annotation", 2000, 100),
        event("network", "gpu_user_annotation", 2000, 5000, stream=7),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 500, 200, stream=13),
        event("sm90_xmma_fprop", "kernel", 2500, 4000, stream=7),
        event("_resolve_and_write", "kernel", 6500, 100, stream=7),
        event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 6600, 50, stream=7),
        {"ph": "M", "name": "process_name"},
    ]
    path.write_text(json.dumps({"traceEvents": events, "baseTimeNanoseconds": base_ns}))
    return path


def test_stages_and_streams_become_rows_on_the_clock_of_the_machine(tmp_path):
    rows = read_trace(write_trace(tmp_path / "trace.json"))
    assert rows == {
        "host": [Span("preprocess", 10.0, 2.0), Span("network", 12.0, 0.1)],
        "stream 13": [Span("copy to the device", 10.5, 0.2)],
        "stream 7": [
            Span("network", 12.5, 4.0),
            Span("postprocess", 16.5, 0.1),
            Span("copy to the host", 16.6, 0.05),
        ],
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resize_kernel", "preprocess"),
        ("void nvjpeg::ycbcr_to_rgb<3>", "preprocess"),
        ("find_candidates", "postprocess"),
        ("cudnn::winograd", "network"),
        ("Memcpy DtoD (Device -> Device)", "preprocess"),
    ],
)
def test_the_work_of_the_gpu_is_told_apart_by_name(name, kind):
    assert device_kind(name) == kind


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and its imports
def test_workers_are_drawn_on_one_clock(tmp_path):
    traces = [write_trace(tmp_path / f"{base}.json", base) for base in (10_000_000, 12_000_000)]
    picture = tmp_path / "timeline.png"
    draw_timeline(picture, list(map(read_trace, traces)), "two workers", length_ms=5)
    assert picture.read_bytes().startswith(b"\x89PNG")
