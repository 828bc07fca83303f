"""The command that sends images, against a stand-in server."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from damoyolo_client import detect
from damoyolo_client.images import find_images
from doubles.interrupt import interrupt_while_waiting
from doubles.stand_in_server import Reply, StandInServer, failed, found

CELL = {"class_id": 1, "label": "RBC", "score": 0.912, "bbox": [1.0, 2.0, 30.5, 40.0]}


def answer_by_content(asked):
    """No detection in an empty slide, an error for a bad image, one cell in any other."""
    if asked.body == b"bad":
        return failed(415, "UnsupportedImage", "no image")
    if asked.headers["X-Detect-Format"] == "jpeg":
        return Reply(body=b"drawn " + asked.body)
    return found() if asked.body == b"empty" else found(CELL)


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "slides"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "more/b.jpg", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_gives_its_images_in_order_and_sub_folders_only_when_recursive(slides):
    assert find_images([slides], recursive=False) == [slides / "a.PNG", slides / "b.jpg"]
    assert slides / "more" / "b.jpg" in find_images([slides], recursive=True)
    assert find_images([slides / "notes.txt"], recursive=False) == [slides / "notes.txt"]


def test_drawn_images_have_names_of_their_own(slides):
    images = [Path("x/a.jpg"), Path("y/a.jpg"), Path("a.png"), Path("a_detections.jpg")]
    names = detect.drawn_names([image.name for image in images])
    assert len(set(names)) == 4
    assert not {image.name for image in images} & set(names)


def test_the_drawn_names_of_very_many_equal_names_are_found_without_trying_all():
    names = detect.drawn_names(["image.jpg"] * 50_000)  # minutes if each tries the names of all before it
    assert len(set(names)) == 50_000
    assert names[:2] == ["image_detections.jpg", "image_detections_2.jpg"]


@pytest.mark.parametrize("name", ["n" * 251, "\N{CJK UNIFIED IDEOGRAPH-56FE}" * 83 + "ab"])
def test_a_drawn_image_has_a_name_although_its_image_s_is_as_long_as_names_can_be(tmp_path, name):
    images, drawn = tmp_path / "images", tmp_path / "drawn"
    images.mkdir()
    (images / f"{name}.jpg").write_bytes(b"long")
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(images), "--url", server.base_url, "--output-dir", str(drawn)]) == 0
    (file,) = drawn.iterdir()
    assert file.read_bytes() == b"drawn long"
    assert name.startswith(file.name.removesuffix("_detections.jpg"))


def test_a_drawn_image_that_cannot_be_written_costs_its_own_image(slides, capsys):
    drawn = slides.parent / "drawn"
    (drawn / "a_detections.jpg").mkdir(parents=True)
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output-dir", str(drawn)]) == 1
    assert "1 of 2 images failed" in capsys.readouterr().err
    assert (drawn / "b_detections.jpg").exists()


def test_the_table_has_a_row_for_each_detection_and_each_empty_image(slides, capsys):
    (slides / "c.jpg").write_bytes(b"empty")
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["image", "class", "score", "x1", "y1", "x2", "y2"]
    assert rows[2] == [str(slides / "b.jpg"), "RBC", "0.912", "1.0", "2.0", "30.5", "40.0"]
    assert rows[3] == [str(slides / "c.jpg"), "(nothing)"]
    assert out.splitlines()[4] == "3 images, 0 failed; 2 detections: RBC 2"
    assert re.fullmatch(r"\d+\.\d s, [\d.]+ images/s, latency p50 \d+ ms", out.splitlines()[5])
    assert err == ""


def test_a_failed_image_is_named_and_the_others_are_answered(slides, capsys):
    (slides / "a.PNG").write_bytes(b"bad")
    json_lines = slides.parent / "new" / "out.jsonl"
    with StandInServer(answer_by_content) as server:
        code = detect.main(
            [str(slides), "--recursive", "--url", server.base_url, "--output", str(json_lines)]
        )
    out, err = capsys.readouterr()
    assert code == 1
    assert "1 of 3 images failed" in err
    assert f"{slides / 'a.PNG'}: 415 UnsupportedImage: no image" in err
    assert out.count(" RBC ") == 3  # two detections and the summary
    rows = [json.loads(line) for line in json_lines.read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(slides / name) for name in ("a.PNG", "b.jpg", "more/b.jpg")]
    assert rows[0]["error"] == {"code": 415, "type": "UnsupportedImage", "message": "no image"}
    assert rows[1]["detections"] == [CELL]


def test_a_label_cannot_steer_the_terminal(slides, capsys):
    def hostile(asked):
        if asked.body == b"b.jpg":
            return failed(422, "\x1b[2Jkind", "two\r\nlines\x07")
        return found({**CELL, "label": "\x1b]0;title\x07\n" + "x" * 100_000})

    json_lines = slides / "out.jsonl"
    with StandInServer(hostile) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output", str(json_lines)]) == 1
    out, err = capsys.readouterr()
    for text in (out, err, json_lines.read_text()):
        assert all(character.isprintable() or character == "\n" for character in text)
    assert r"\x1b]0;title\x07\nxxx" in out
    assert len(out) < 10_000
    assert r"422 \x1b[2Jkind: two\r\nlines\x07" in err


def test_a_file_name_that_is_no_text_is_sent_and_shown(slides, capsys):
    (slides / os.fsdecode(b"\xff\x1b.jpg")).write_bytes(b"image")
    json_lines = slides / "out.jsonl"
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output", str(json_lines)]) == 0
    assert r"\udcff\x1b.jpg" in capsys.readouterr().out
    assert len(json_lines.read_text().splitlines()) == 3


def test_a_server_that_starts_again_costs_no_image_and_is_mentioned(slides, capsys):
    counter = count()

    def starting(asked):
        return failed(500, "InternalServerException", "Worker died.") if next(counter) < 2 else found(CELL)

    with StandInServer(starting) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--in-flight", "1"]) == 0
        assert detect.main([str(slides), "--url", server.base_url, "--retry-seconds", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.count(" RBC ") == 4 + 2  # and two summaries
    assert err == "detect: 2 requests were sent again\n"


def test_what_is_sent_again_for_too_long_is_named(slides, capsys):
    with StandInServer(lambda asked: failed(503, "ServiceUnavailableException", "full")) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--retry-seconds", "0"]) == 1
    assert "2 of 2 images failed" in capsys.readouterr().err


def test_an_interrupt_ends_the_command_at_once_in_one_line(slides, project_dir):
    interrupted = interrupt_while_waiting(["scripts/detect.py", str(slides)], project_dir)
    assert interrupted == (130, "detect: interrupted\n")


def test_a_proxy_of_the_environment_is_not_used(slides, project_dir):
    with StandInServer(answer_by_content) as server, socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
        command = [sys.executable, "scripts/detect.py", str(slides), "--url", server.base_url]
        environment = {**os.environ, **dict.fromkeys(names, url), "no_proxy": "", "NO_PROXY": ""}
        subprocess.run(
            command, cwd=project_dir, env=environment, stdout=subprocess.DEVNULL, timeout=60, check=True
        )
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody connected
            proxy.accept()


def test_drawn_images_are_written_beside_nothing_else(slides):
    output = slides.parent / "drawn"
    with StandInServer(answer_by_content) as server:
        assert (
            detect.main([str(slides), "--recursive", "--url", server.base_url, "--output-dir", str(output)])
            == 0
        )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        "a_detections.jpg": b"drawn a.PNG",
        "b_detections.jpg": b"drawn b.jpg",
        "b_detections_2.jpg": b"drawn more/b.jpg",
    }


def test_options_reach_the_server_as_headers_and_unset_ones_do_not(slides):
    options = ["--score-threshold", "0.5", "--iou-threshold", "0.6", "--max-detections", "7"]
    options += ["--classes", "RBC, 2", "--class-agnostic"]
    with StandInServer(answer_by_content) as server:
        detect.main([str(slides / "b.jpg"), "--url", server.base_url, *options])
        detect.main([str(slides / "b.jpg"), "--url", server.base_url])
    with_options, without = (
        {name: value for name, value in asked.headers.items() if name.startswith("X-Detect-")}
        for asked in server.asked
    )
    assert without == {"X-Detect-Format": "json"}
    assert with_options == {
        **without,
        "X-Detect-Score-Threshold": "0.5",
        "X-Detect-Iou-Threshold": "0.6",
        "X-Detect-Max-Detections": "7",
        "X-Detect-Classes": "RBC,2",
        "X-Detect-Class-Agnostic": "true",
    }


def test_many_images_are_not_listed_unless_asked_for(slides, capsys):
    for number in range(detect.FEW_IMAGES):
        (slides / f"{number}.jpg").write_bytes(b"image")
    with StandInServer(answer_by_content) as server:
        command = [str(slides), "--url", server.base_url]
        assert detect.main(command) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert detect.main([*command, "--verbose"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + 12 + 2


def test_a_quiet_command_prints_failures_alone(slides, capsys):
    (slides / "a.PNG").write_bytes(b"bad")
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("detect: 1 of 2 images failed:\n")


def test_of_many_failures_the_first_are_shown(slides, capsys):
    for number in range(30):
        (slides / f"{number}.jpg").write_bytes(b"bad")
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + detect.MAX_FAILURES_SHOWN + 1
    assert lines[-1] == "  and 10 more"


def test_a_quoted_pattern_an_address_and_standard_input_are_images(slides, capsys, monkeypatch):
    sent = []

    def answer(asked):
        if asked.method == "GET":
            return Reply(body=b"downloaded")
        sent.append(asked.body)
        return found(CELL)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    with StandInServer(answer) as server:
        named = [f"{slides}/**/*.jpg", f"{server.base_url}/a/image.png?x=1", "-"]
        output = slides.parent / "drawn"
        command = [*named, "--url", server.base_url, "--in-flight", "1", "--output-dir", str(output)]
        assert detect.main(command) == 0
    assert sent[::2] == [b"b.jpg", b"more/b.jpg", b"downloaded", b"piped"]
    assert {path.stem for path in output.iterdir()} == {
        "b_detections",
        "b_detections_2",
        "image_detections",
        "stdin_detections",
    }


def test_an_address_that_answers_an_error_fails_its_own_image(slides, capsys):
    with StandInServer(lambda asked: Reply(404) if asked.method == "GET" else found(CELL)) as server:
        address = f"{server.base_url}/image.jpg"
        assert detect.main([address, str(slides / "b.jpg"), "--url", server.base_url]) == 1
    out, err = capsys.readouterr()
    assert "1 failed; 1 detections" in out
    assert f"{address} answers 404" in err


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["*.nothing"], "matches no file"),
        (["-"], "standard input, which is empty"),
        (["-", "-"], "given twice"),
    ],
)
def test_what_names_no_image_is_refused(capsys, monkeypatch, named, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert detect.main(named) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "x.txt"], "accepted are .jsonl"),
        (["--format", "coco"], "--output, which is missing"),
        (["--coco", "x.json"], "--output, which is missing"),
        (["--output", "x.jsonl", "--coco", "x.json"], "--coco is for COCO results"),
        (["--url", "http://127.0.0.1:1/predictions/damoyolo"], "without /predictions"),
    ],
)
def test_options_that_do_not_go_together_are_refused(slides, capsys, options, said):
    assert detect.main([str(slides), *options]) == 2
    assert said in capsys.readouterr().err


def test_results_load_with_pycocotools_by_the_list_of_images_beside_them(slides, capsys):
    results = slides.parent / "new" / "found.json"
    (slides / "c.jpg").write_bytes(b"bad")
    with StandInServer(answer_by_content) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output", str(results)]) == 1
    truth = COCO(str(results.with_name("found.images.json")))
    loaded = truth.loadRes(str(results))
    assert [truth.imgs[each["image_id"]]["file_name"] for each in loaded.anns.values()] == [
        str(slides / "a.PNG"),
        str(slides / "b.jpg"),
    ]
    assert {each["category_id"] for each in loaded.anns.values()} == {2}
    assert truth.cats == {2: {"id": 2, "name": "RBC"}}
    assert loaded.anns[1]["bbox"] == [1.0, 2.0, 29.5, 38.0]


def test_results_have_the_ids_of_an_annotations_file(slides, capsys):
    annotations = slides / "annotations.json"
    images = [{"id": 70 + index, "file_name": f"any/{name}"} for index, name in enumerate(("a.PNG", "b.jpg"))]
    categories = [{"id": 5, "name": "rbc"}]
    annotations.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    results = slides / "found.results"
    with StandInServer(answer_by_content) as server:
        command = ["--url", server.base_url, "--output", str(results), "--format", "coco"]
        assert detect.main([str(slides), *command, "--coco", str(annotations)]) == 0
        found_in = json.loads(results.read_text())
        assert [(each["image_id"], each["category_id"]) for each in found_in] == [(70, 5), (71, 5)]
        asked = len(server.asked)
        (slides / "c.jpg").write_bytes(b"image")
        assert detect.main([str(slides), *command, "--coco", str(annotations)]) == 2
        assert "c.jpg is not among the images of" in capsys.readouterr().err
        assert len(server.asked) == asked


def write_annotations(file, names, categories):
    images = [{"id": 70 + index, "file_name": name} for index, name in enumerate(names)]
    file.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))


def test_two_images_of_one_id_are_refused_before_any_is_sent(slides, capsys):
    annotations = slides / "annotations.json"
    write_annotations(annotations, ["a.PNG", "b.jpg"], [{"id": 5, "name": "RBC"}])
    with StandInServer(answer_by_content) as server:
        command = ["--url", server.base_url, "--output", str(slides / "x.json"), "--coco", str(annotations)]
        assert detect.main([str(slides), "--recursive", *command]) == 2
        assert server.asked == []
    err = capsys.readouterr().err
    assert f"{slides / 'more/b.jpg'} and {slides / 'b.jpg'} are both image 71 of" in err


def test_a_class_that_the_annotations_lack_costs_its_own_image(slides, capsys):
    annotations, results = slides / "annotations.json", slides / "found.json"
    write_annotations(annotations, ["a.PNG", "b.jpg"], [{"id": 5, "name": "RBC"}])

    def answer(asked):
        return found(CELL, {**CELL, "label": "eel"}) if asked.body == b"a.PNG" else found(CELL)

    with StandInServer(answer) as server:
        command = ["--url", server.base_url, "--output", str(results), "--coco", str(annotations)]
        assert detect.main([str(slides), *command]) == 1
    out, err = capsys.readouterr()
    assert "2 images, 1 failed; 1 detections" in out
    assert "a.PNG: class 'eel' is not among the categories of" in err
    assert [each["image_id"] for each in json.loads(results.read_text())] == [71]


def test_a_class_id_with_another_label_than_before_costs_its_own_image(slides, capsys):
    results = slides / "found.json"

    def answer(asked):
        return found({**CELL, "label": "eel"} if asked.body == b"b.jpg" else CELL)

    with StandInServer(answer) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output", str(results)]) == 1
    assert "b.jpg: class 1 is 'eel', but was 'RBC' before" in capsys.readouterr().err
    assert [each["image_id"] for each in json.loads(results.read_text())] == [1]


def test_an_answer_without_a_size_costs_its_own_image(slides, capsys):
    def answer(asked):
        return Reply(body=b'{"detections": []}') if asked.body == b"a.PNG" else found(CELL)

    results = slides / "found.json"
    with StandInServer(answer) as server:
        assert detect.main([str(slides), "--url", server.base_url, "--output", str(results)]) == 1
    assert "1 of 2 images failed" in capsys.readouterr().err
    assert len(json.loads(results.read_text())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_command_writes_the_results_so_far(slides, project_dir, number):
    for index in range(20):
        (slides / f"{index}.jpg").write_bytes(b"image")
    results, release, asked = slides / "found.json", threading.Event(), count(1)

    def answer(_asked):
        if next(asked) > 10:
            release.wait(60)
        return found(CELL)

    with StandInServer(answer) as server:
        command = [str(slides), "--url", server.base_url, "--output", str(results), "--in-flight", "2"]
        with subprocess.Popen(
            [sys.executable, "scripts/detect.py", *command, "--verbose"],
            cwd=project_dir,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for _ in range(1 + 5):
                process.stdout.readline()
            process.send_signal(number)
            assert process.wait(30) == 130
            assert process.stderr.read() == "detect: interrupted\n"
        release.set()
    assert 5 <= len(json.loads(results.read_text())) <= 10
    assert len(json.loads((slides / "found.images.json").read_text())["images"]) >= 5


def test_the_progress_bar_is_shown_off_a_terminal_only_when_forced(slides, capsys):
    with StandInServer(answer_by_content) as server:
        detect.main([str(slides), "--url", server.base_url, "--progress"])
    assert "2/2" in capsys.readouterr().err


def test_without_a_server_the_error_names_the_command_that_starts_one(slides, capsys):
    with StandInServer(answer_by_content) as server:
        url = server.base_url
    assert detect.main([str(slides), "--url", url]) == 2
    assert "scripts/serve.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("absent.jpg", "does not exist"), ("hollow", "--recursive"), ("pipe", "regular")]
)
def test_a_path_without_images_is_named(slides, capsys, name, said):
    (slides / "hollow").mkdir()
    os.mkfifo(slides / "pipe")
    assert detect.main([str(slides / name)]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert said in err


@pytest.mark.parametrize(
    "option",
    ["--score-threshold=1.5", "--iou-threshold=nan", "--max-detections=0", "--timeout=inf", "--classes=a,,b"],
)
def test_a_value_out_of_range_is_a_usage_error(slides, option):
    with pytest.raises(SystemExit) as exit_info:
        detect.main([str(slides), option])
    assert exit_info.value.code == 2
