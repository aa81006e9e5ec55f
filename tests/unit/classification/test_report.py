import pytest
from some_prompt import some_prompt

from rft_cluster.classification.answers import AnswerReader, Vote
from rft_cluster.classification.intervals import paired_difference
from rft_cluster.classification.report import compare, judge, knows_pixels, report, summarise
from rft_cluster.common.errors import UserError
from rft_cluster.messages import Completion, Group

FULL = "<think>red</think><answer>rose</answer>"


def group(*texts: str) -> Group:
    prompt = some_prompt("test/0/0", "photos/a.png", b"", "Which flower?", "rose", 0)
    return Group(prompt, [1, 2], [Completion([1], [-0.1], text, "stop", 0) for text in texts])


def test_three_of_four_by_hand():
    # Wilson for 3 of 4 with z = 1.959964, z^2 = 3.841459:
    # centre (0.75 + z^2 / 8) / (1 + z^2 / 4) = 1.2301824 / 1.9603647 = 0.627527
    # half width z * sqrt(0.75 * 0.25 / 4 + z^2 / 64) / 1.9603647 = 1.959964 * 0.326952 / 1.9603647 = 0.326885
    evaluation = summarise(7, "test", [group(FULL), group(FULL), group("<answer>Rose</answer>"), group("rose")])
    assert (evaluation.step, evaluation.split, evaluation.n) == (7, "test", 4)
    assert evaluation.accuracy_strict == 0.75
    assert evaluation.accuracy_lenient == 1.0
    assert evaluation.format_rate == 0.5
    assert evaluation.interval == pytest.approx((0.300642, 0.954412), abs=1e-5)


def test_all_wrong_has_an_interval_above_zero():
    # Wilson for 0 of 10: from 0 to z^2 / (10 + z^2) = 3.841459 / 13.841459 = 0.277533
    evaluation = summarise(0, "validation", [group("<answer></answer>")] * 10)
    assert evaluation.accuracy_strict == 0.0
    assert evaluation.interval == pytest.approx((0.0, 0.277533), abs=1e-5)


def test_only_the_first_completion_counts():
    assert summarise(0, "test", [group("e", FULL)]).accuracy_strict == 0.0
    assert summarise(0, "test", [group(FULL, "e")]).accuracy_strict == 1.0


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no groups for split 'test' at step 7"):
        summarise(7, "test", [])


def asked(index: int, label: str, text: str) -> Group:
    prompt = some_prompt(f"test/0/{index}", f"photos/{index}.png", b"", "Which flower?", label, 0)
    return Group(prompt, [1, 2], [Completion([1], [-0.1], text, "stop", 0)])


PIXELS = {f"photos/{i}.png": f"p{i}" for i in range(10)}
READER = AnswerReader(["rose", "pink primrose"], {})


def say(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


def test_an_answer_is_judged_strictly_and_leniently():
    # "rose" is inside "pink primrose": right by containment alone.
    judged = judge(asked(0, "pink primrose", say("rose")), READER)
    assert (judged.predicted, judged.strict, judged.lenient, judged.formatted) == ("rose", False, True, True)
    judged = judge(asked(0, "rose", "Rose"), READER)
    assert (judged.predicted, judged.strict, judged.lenient, judged.formatted) == (None, False, True, False)


@pytest.mark.parametrize("layout", ["", "{}", "<answer>{}</answer>", FULL.replace("rose", "{}")])
@pytest.mark.parametrize("nothing", ["", " ", "\t ", "_", "-", "...", "\u200b", "\u00a0", "'"])
@pytest.mark.parametrize("label", ["rose", "pink primrose", "d'or - x."])
def test_an_empty_answer_is_wrong_leniently_too(layout, nothing, label):
    asking = asked(0, label, layout.format(nothing))
    assert not judge(asking, READER).lenient
    assert summarise(1, "test", [asking]).accuracy_lenient == 0.0


def test_a_report_by_hand():
    texts = [("rose", say("rose")), ("rose", say("pink primrose")), ("rose", "rose"), ("pink primrose", say("rose"))]
    judged = [judge(asked(i, label, text), READER) for i, (label, text) in enumerate(texts)]
    votes = [Vote(label, 1.0, {}, "") for label in ("rose", "rose", None, "rose")]
    figures = report(judged, votes, ["rose", "pink primrose"], PIXELS)
    assert [image["pixels"] for image in figures["predictions"]] == ["p0", "p1", "p2", "p3"]
    assert (figures["greedy"]["strict"]["right"], figures["greedy"]["strict"]["n"]) == (1, 4)
    assert figures["greedy"]["lenient"]["rate"] == 1.0  # each answer contains its label, or is in it
    assert figures["greedy"]["format"]["rate"] == 0.75
    assert figures["vote"]["strict"]["rate"] == 0.5
    assert figures["confusion"]["columns"] == ["rose", "pink primrose", "(no class)"]
    assert figures["confusion"]["counts"] == [[1, 1, 1], [1, 0, 0]]
    rose, primrose = figures["classes"]
    assert (rose["right"], rose["n"], rose["predicted_in_all"]) == (1, 3, 2)
    assert rose["taken_for"] == {"pink primrose": 1, "(no class)": 1}
    assert primrose["taken_for"] == {"rose": 1}
    assert figures["format_failures"] == {"count": 1, "examples": [{"id": "photos/2.png", "text": "rose"}]}
    assert figures["vote_minus_greedy"]["difference"] == 0.25


def test_a_paired_difference_by_hand():
    # 10 pairs, 1 right only in the first, 4 only in the second. Agresti and Min: b = 4.5, c = 1.5, n = 12;
    # centre 3 / 12 = 0.25; half 1.959964 * sqrt(6 - 9 / 12) / 12 = 1.959964 * 2.291288 / 12 = 0.374238
    first = [True] * 4 + [False] * 6
    second = [True] * 3 + [False] + [True] * 4 + [False] * 2
    figures = paired_difference(first, second)
    assert (figures["only_first"], figures["only_second"], figures["n"]) == (1, 4, 10)
    assert figures["difference"] == pytest.approx(0.3)
    assert figures["interval"] == pytest.approx([-0.124238, 0.624238], abs=1e-5)
    assert figures["p"] == pytest.approx(2 * (1 + 5) / 32)  # of 5 uneven pairs at most 1 one way, both ends


def test_the_same_answers_differ_by_nothing():
    figures = paired_difference([True, False], [True, False])
    assert (figures["difference"], figures["p"]) == (0.0, 1.0)
    assert figures["interval"][0] < 0 < figures["interval"][1]


def row(identifier: str, label: str, strict: bool, **more: str) -> dict:
    return {"id": identifier, "label": label, "strict": strict, "voted": label, **more}


def test_comparing_goes_image_by_image_whatever_the_order():
    first = {"predictions": [row("a", "x", True), row("b", "x", False)]}
    second = {"predictions": [row("b", "x", True), row("a", "x", True)]}
    assert compare(first, second)["greedy"]["difference"] == 0.5
    assert compare(first, second)["vote"]["difference"] == 0.0


def test_comparing_other_images_is_refused():
    with pytest.raises(UserError, match="2 and 1, 1 of them in both"):
        compare({"predictions": [row("a", "x", True), row("b", "x", True)]}, {"predictions": [row("a", "x", True)]})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("label", "pixels"), [("tulip", "1"), ("rose", "2"), ("tulip", "2"), ("rose", "1")])
def test_the_same_name_is_the_same_image_only_with_its_label_and_its_pixels(label, pixels, known):
    first = row("rose/a.jpg", "rose", True, **({"pixels": "1"} if known else {}))
    second = row("rose/a.jpg", label, False, pixels=pixels)
    reports = {"predictions": [first]}, {"predictions": [second]}
    if label != "rose":
        with pytest.raises(UserError, match=r"same labels: 1 of 1 have another label .*rose/a\.jpg: rose, then tulip"):
            compare(*reports)
    elif known and pixels != "1":
        with pytest.raises(UserError, match=r"same pictures: 1 of 1 have other pixels .*rose/a\.jpg: 1, then 2"):
            compare(*reports)
    else:
        assert compare(*reports)["greedy"]["difference"] == -1.0
    assert list(map(knows_pixels, reports)) == [known, True]
