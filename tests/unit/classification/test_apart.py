import pytest

from rft_cluster.classification.apart import NOTE, apart, apart_lines
from rft_cluster.classification.report import Judged


def judged(label: str, strict: bool) -> Judged:
    return Judged("a", label, "", label if strict else None, strict, strict, True)


BEFORE = [judged("rose", False), judged("tulip", False), judged("lily", False), judged("rose", True)]
AFTER = [judged("rose", True), judged("tulip", True), judged("lily", False), judged("rose", True)]


def test_each_has_its_rate_and_interval():
    found = apart(AFTER, ("lily",))
    assert (found["seen"]["right"], found["seen"]["n"], found["unseen"]["rate"]) == (3, 3, 0.0)
    assert found["unseen"]["interval"] == pytest.approx([0, 0.793], abs=0.001)  # Wilson's, by hand: z²/(1+z²)
    assert apart(AFTER, ()) == {} and apart_lines(BEFORE, AFTER, ()) == []


def test_the_gain_of_each_is_said_image_by_image():
    seen, unseen, note = apart_lines(BEFORE, AFTER, ("lily",))
    assert seen.startswith("seen classes: test accuracy 100.0 % (43.9 to 100.0, 3 images), +66.7 points (")
    assert unseen.startswith("unseen classes: test accuracy 0.0 %") and "+0.0 points" in unseen and note == NOTE
    assert "untrained" not in apart_lines([], AFTER, ("lily",))[0]
