"""What rounding explains between two answers to one image, and what it does not."""

import dataclasses

import pytest

from lib.accuracy.agreement import DEFAULT_RULES, differences, overlap


def box(label="a", score=0.8, x1=0.0, y1=0.0, x2=40.0, y2=40.0):
    return {"label": label, "score": score, "bbox": [x1, y1, x2, y2]}


FAR = box(x1=200.0, x2=240.0)


def test_order_does_not_matter_and_rounding_is_accepted():
    moved = box(score=0.81, x1=2.0, y2=38.5)
    assert differences([FAR, moved], [box(), FAR]) == []


@pytest.mark.parametrize(
    "other", [box(score=0.83), box(x1=2.1), box(label="b"), box(x1=100.0, x2=140.0), None]
)
def test_more_than_rounding_is_named(other):
    found = [FAR] if other is None else [FAR, other]
    problems = differences(found, [box(), FAR])
    assert "a 0.800 at [0.0, 0.0, 40.0, 40.0] is missing" in problems
    assert len(problems) == len(found)


def test_a_detection_near_the_threshold_may_be_in_one_answer_alone():
    weak = box(score=0.269, x1=100.0, x2=140.0)
    assert differences([box(), weak], [box()]) == differences([box()], [box(), weak]) == []
    stricter = dataclasses.replace(DEFAULT_RULES, score_threshold=0.2)
    assert len(differences([box(), weak], [box()], stricter)) == 1


def test_where_a_list_is_cut_off_the_last_may_be_another():
    cut = dataclasses.replace(DEFAULT_RULES, max_detections=2)
    second, third = box(score=0.6, x1=100.0, x2=140.0), box(score=0.59, x1=300.0, x2=340.0)
    assert differences([box(), second], [box(), third], cut) == []
    assert len(differences([box(), second], [box(), third])) == 2


def test_a_box_that_is_nearly_suppressed_may_be_in_one_answer_alone():
    near = box(score=0.7, x1=16.0, x2=56.0)  # IoU 24 / 56
    assert overlap(near["bbox"], box()["bbox"]) == pytest.approx(24 / 56)
    assert differences([box(), near], [box()]) == []
    other_class = {**near, "label": "b"}
    assert len(differences([box(), other_class], [box()])) == 1
    agnostic = dataclasses.replace(DEFAULT_RULES, class_agnostic=True)
    assert differences([box(), other_class], [box()], agnostic) == []
    assert len(differences([near], [box()])) == 2  # the one that would suppress it is missing too


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
