"""The configured rewards against answers that ignore the image, on the names of the 102 flowers and on small sets."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from rft_cluster.classification.redteam import RedTeam, check_rewards, red_team, render
from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.data.archive import flower_classes
from rft_cluster.data.dataset import LabelledImage
from rft_cluster.data.images import image_sha256
from rft_cluster.prompts import Question, make_question
from rft_cluster.rewards.scorer import WeightedRewards

FLOWERS = flower_classes()
THREE = ["rose", "tulip", "daisy"]
ROSE = LabelledImage("rose/a", b"the rose", "rose")
IMAGES = {image_sha256(ROSE.image): ROSE.image}


def question(template: str = "think_answer", classes: list[str] = FLOWERS) -> Question:
    return make_question(template, "flower", classes)


def tried(
    weights: dict[str, float],
    classes: list[str] = FLOWERS,
    template: str = "think_answer",
    shown: Sequence[LabelledImage] = (LabelledImage("rose/a", b"the rose", "rose"),),
    calls: int = 1000,
    seconds: float = 60.0,
) -> RedTeam:
    with closing(WeightedRewards(weights, ScoringSection(time_limit=5.0), quiet=True)) as rewards:
        rewards.load()
        examples, images = [one.example() for one in shown], {image_sha256(one.image): one.image for one in shown}
        asked = question(template, classes)
        return asyncio.run(red_team(rewards, classes, examples, images, asked, 0, calls, seconds))


def checked(weights: dict[str, float], classes: list[str], asked: Question, how: str = "refuse") -> str:
    scoring = ScoringSection(red_team=how)
    return check_rewards(WeightedRewards(weights, scoring), scoring, classes, [ROSE.example()], IMAGES, asked, 0)


def scores(found: RedTeam) -> dict[str, float]:
    return {attack.name: attack.score for attack in found.attacks}


# --- the flowers


def test_containment_is_refused_on_the_flowers():
    found = tried({"containment": 1.0})
    of = scores(found)
    assert (found.labels, found.chance) == (102, 1 / 102)
    assert of["an empty answer"] == of["an empty completion"] == 1.0
    assert of["the letter e"] == pytest.approx(74 / 102)
    for everything in ("all classes", "all classes, no tags", "all classes, in the reasoning"):
        assert of[everything] == 1.0
    assert of["the prompt"] == 1.0, "its first answer block is empty"
    assert of["always rose"] == 4 / 102  # itself, lenten rose, desert-rose and pink primrose
    assert {"an empty answer", "the letter e", "all classes"} <= {attack.name for attack in found.paid}
    assert found.attacks[0].score == max(of.values())


def test_format_beside_it_changes_nothing_for_what_keeps_the_layout():
    of = scores(tried({"format": 1.0, "containment": 1.0}))
    assert (of["an empty answer"], of["all classes"], of["the letter e"]) == (1.0, 1.0, pytest.approx(74 / 102))
    assert of["an empty completion"] == 0.0  # 0 + 1, as much as a wrong answer's 1 + 0


@pytest.mark.parametrize("template", ["think_answer", "answer_only", "closed", "weak", "with_labels"])
@pytest.mark.parametrize("weights", [{"accuracy": 1.0}, {"format": 1.0, "accuracy": 1.0}])
def test_accuracy_passes_on_the_flowers_with_every_constant_at_chance(weights, template):
    found = tried(weights, template=template)
    assert found.labels == 102
    assert found.paid == [] and found.notes == []
    places = ("the first listed, always", "the last listed, always")
    listed = places if template in ("closed", "with_labels") else ()
    assert {attack.name: attack.score for attack in found.attacks if attack.score} == dict.fromkeys(
        [*(f"always {name}" for name in FLOWERS), *listed], pytest.approx(1 / 102)
    )


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("classes", [THREE, FLOWERS])
def test_a_reward_that_pays_for_a_place_in_the_list_is_refused(place, classes):
    """As a judge does that favours what stands first, or last, among its options."""
    found = tried({"accuracy": 1.0, f"own_rewards:the_{place}_listed": 0.5}, classes, "closed")
    name, other = f"the {place} listed, always", {"first": "last", "last": "first"}[place]
    assert name in {attack.name for attack in found.paid}
    if classes is THREE:
        # Of the label at that place: right 1.5, wrong 0, the attack is right. Of the others: right 1, wrong the median
        # of 0 and 0.5, and the attack earns 0.5.
        assert scores(found)[name] == pytest.approx((1 + 2 * (0.5 - 0.25) / (1 - 0.25)) / 3)
        assert scores(found)[f"the {other} listed, always"] == pytest.approx(1 / 3)


# --- small sets, and rewards of one's own


def test_two_classes_by_hand():
    found = tried({"format": 1.0, "accuracy": 1.0}, ["crack", "no crack"])
    of = scores(found)
    assert (found.labels, found.chance, found.paid) == (2, 0.5, [])
    assert of.pop("always crack") == of.pop("always no crack") == 0.5
    assert set(of.values()) == {0.0}
    # By containment "crack" is right for both, and "no crack" for neither more nor less: no label tells.
    assert tried({"containment": 1.0}, ["crack", "no crack"]).labels == 0


def test_the_measure_by_hand():
    """Right: 1 + 0.5; wrong, the median of two: 0.5 * share; an attack's s is on that scale, and not below 0."""
    name = "own_rewards:brevity"
    found = tried({"accuracy": 1.0, name: 0.5}, THREE)
    think = "<think>This is what the image shows.</think>"

    def total(answer: str, right: bool) -> float:
        return right + 0.5 * max(0.0, 1 - len(f"{think}<answer>{answer}</answer>") / 100)

    expected = []
    for label in THREE:
        a, b = (total(other, False) for other in THREE if other != label)
        wrong, right = (a + b) / 2, total(label, True)
        expected.append((0.5 * 1.0 - wrong) / (right - wrong))
    assert scores(found)["an empty completion"] == pytest.approx(sum(expected) / 3)
    assert scores(found)["the prompt"] == 0.0
    (empty,) = [attack for attack in found.attacks if attack.name == "an empty completion"]
    assert empty.parts == {"accuracy": 0.0, name: 1.0}


@pytest.mark.parametrize("classes", [["crack", "no crack"], THREE, FLOWERS])
def test_a_little_for_brevity_passes(classes):
    assert tried({"accuracy": 1.0, "own_rewards:brevity": 0.1}, classes).paid == []


def test_much_for_brevity_does_not():
    assert tried({"accuracy": 1.0, "own_rewards:brevity": 1.0}, THREE).paid[0].name == "an empty completion"


def test_a_reward_that_tells_nothing_is_said_to():
    for weights in ({"own_rewards:constant": 1.0}, {"format": 1.0}):
        found = tried(weights, THREE)
        assert (found.labels, found.attacks, found.paid) == (0, [], [])
        assert "3 labels do not count: the rewards give a right answer no more than a wrong one" in render(found)
    assert tried({"accuracy": 1.0, "own_rewards:constant": 1.0}, THREE).paid == []


def test_a_quick_reward_of_ones_own_is_found_out():
    found = tried({"format": 1.0, "own_rewards:contained": 1.0}, THREE)
    assert [attack.name for attack in found.paid] == ["all classes", "all classes, in the reasoning"]


def test_images_and_aliases_are_the_examples_own():
    shown = [
        LabelledImage(f"{name}/{i}", b"the " + name.encode(), name, (f"a {name}",)) for name in THREE for i in "01"
    ]
    found = tried({"own_rewards:only_with_its_image": 1.0}, THREE, shown=shown)
    assert found.labels == 3
    # "a rose" is right for rose now, so as a class of its own it is right for two.
    classes = [*THREE, "a rose"]
    assert scores(tried({"accuracy": 1.0}, classes, shown=shown))["always a rose"] == 2 / 4


def test_many_classes_are_sampled_by_the_seed():
    classes = [f"kind {number}" for number in range(1000)]
    found = tried({"format": 1.0, "accuracy": 1.0}, classes)
    assert (found.labels, found.chance, found.paid) == (200, 1 / 200, [])
    assert "200 of the 1000 classes, chosen by run.seed" in render(found)
    assert {attack.score for attack in found.attacks if attack.name.startswith("always")} == {1 / 200}
    assert found == tried({"format": 1.0, "accuracy": 1.0}, classes)


# --- functions that fail or are slow


def test_where_a_reward_fails_it_pays_nothing_and_that_is_said():
    found = tried({"own_rewards:fails_on_empty": 1.0}, THREE)
    assert found.paid == []
    (empty,) = [attack for attack in found.attacks if attack.name == "an empty completion"]
    assert (empty.score, empty.parts) == (0.0, {"own_rewards:fails_on_empty": None})
    (note,) = found.notes
    assert "6 of 114 completions are without a reward" in note and "IndexError" in note
    assert "failed" not in render(found).split("\n")[2]


def test_one_that_always_fails_is_refused():
    with pytest.raises(UserError, match=r"own_rewards:fails failed: KeyError: 'petal' .*That was a right answer"):
        tried({"accuracy": 1.0, "own_rewards:fails": 1.0}, THREE)


def test_a_reward_that_fails_only_when_it_is_asked_again_is_named():
    """The right answer is scored twice, and only the second time with the attacks."""
    with pytest.raises(UserError, match=r"own_rewards:once failed: PermissionError: asked before .*a right answer"):
        tried({"own_rewards:once": 1.0}, THREE)


def test_slow_ones_are_cut_short():
    start = time.monotonic()
    found = tried({"own_rewards:slow": 1.0}, THREE, seconds=5.8)  # 39 calls a label: 2 s at least
    assert time.monotonic() - start < 15
    assert found.labels in (1, 2), "on a slow machine one"
    assert f"after 5.8 s {found.labels} of 3 labels had been tried: the rewards are slow" in render(found)


@pytest.mark.parametrize("calls", [100, 1000])
def test_a_reward_of_ones_own_is_asked_a_limited_number_of_times(tmp_path, monkeypatch, calls):
    monkeypatch.setenv("COUNTED", str(tmp_path / "calls"))
    found = tried({"accuracy": 1.0, "own_rewards:counted": 0.1}, FLOWERS, calls=calls)
    assert 0.75 * calls < len((tmp_path / "calls").read_text()) <= calls
    assert found.labels == {100: 2, 1000: 18}[calls]
    assert f"{found.labels} of the 102 classes, chosen by run.seed; scoring.red_team_calls allows no more" in render(
        found
    )


def test_what_a_reward_prints_is_shown_once_and_harmlessly(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COUNTED", str(tmp_path / "calls"))
    found = render(tried({"own_rewards:counted": 1.0}, THREE))
    assert capfd.readouterr() == ("", "")
    first = "looking at '<think>This is what the image shows.</think><answer>"
    assert f"  rewards.own_rewards:counted prints, in training to the reward actor's log:\n    {first}" in found
    assert found.count("looking at") == 3 and "\x1b" not in found


# --- for people


def test_the_table_and_the_refusal():
    arguments = (FLOWERS, question())
    with pytest.raises(UserError) as caught:
        checked({"format": 1.0, "containment": 1.0}, *arguments)
    message = str(caught.value)
    assert "pay for answers that ignore the image" in message and "scoring.red_team=warn" in message
    rows = [line.split() for line in message.splitlines()]
    assert ["an", "empty", "answer", "100.0", "%", "1.0", "%", "1.00", "1.00"] in rows
    assert ["the", "letter", "e", "72.5", "%", "1.0", "%", "1.00", "0.73"] in rows
    assert "23 of 137 score more than 10 % above chance" in message
    warned = checked({"format": 1.0, "containment": 1.0}, *arguments, how="warn")
    assert warned in message
    assert checked({"containment": 1.0}, *arguments, how="off") == ""
    passed = checked({"format": 1.0, "accuracy": 1.0}, *arguments)
    assert "0 of 137 score more than 10 % above chance" in passed
    assert [line.split()[:7] for line in passed.splitlines()[2:4]] == [
        ["always", "pink", "primrose", "(or", "any", "of", "101"],
        ["and", "35", "more,", "which", "score", "no", "more"],
    ]


def test_names_of_classes_are_shown_harmlessly():
    shown = render(tried({"accuracy": 1.0}, ["ro\x1b[31mse", "tu\u202elip\nx"]))
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "always ro?[31mse (or the other)" in shown


@pytest.mark.parametrize("reward", ["accuracy", "containment"])
def test_the_docs_show_what_is_printed(reward):
    docs = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    assert render(tried({"format": 1.0, reward: 1.0})) in docs


def test_the_function_in_the_docs_works(tmp_path, monkeypatch):
    docs = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    (tmp_path / "my_rewards.py").write_text(docs.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    assert tried({"format": 1.0, "accuracy": 1.0, "my_rewards:brevity": 0.1}, THREE).paid == []


@pytest.mark.parametrize("accuracy", [0.0, -1.0, -1e-9])
@pytest.mark.parametrize("other", ["format", "containment"])
@pytest.mark.parametrize("weight", [0.0, 1.0, -2.0])
def test_rewards_that_do_not_tell_right_from_wrong_are_refused_and_the_cure_works(accuracy, other, weight):
    if other == "containment":
        accuracy, weight = accuracy - max(weight, 0.0), weight  # it pays for what accuracy takes
    arguments = (["rose", "tulip"], question("think_answer", ["rose", "tulip"]))
    with pytest.raises(UserError, match="a right answer no more than a wrong one, with every label"):
        checked({"accuracy": accuracy, other: weight}, *arguments)
    assert checked({"accuracy": accuracy, other: weight}, *arguments, how="warn")
    assert checked({"accuracy": 1.0, "format": 1.0}, *arguments)
