"""What the driver makes of the learners' figures before anything is sent, saved or exported."""

import pytest

from rft_cluster.cluster import handles
from rft_cluster.cluster.handles import Update
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.messages import LearnerStats


def waited_for(monkeypatch: pytest.MonkeyPatch, *ranks: LearnerStats) -> LearnerStats | None:
    monkeypatch.setattr(handles, "wait_for", lambda calls, timeout, doing, meanwhile: list(ranks))
    return Update({"call": "learner"}, 1.0, step=11).wait()  # type: ignore[dict-item]


def test_weights_that_are_not_finite_on_one_rank_end_the_run(monkeypatch):
    whole, spoilt = LearnerStats(learning_rate=0.5), LearnerStats(learning_rate=0.5, finite_weights=False)
    assert waited_for(monkeypatch, whole, whole) == whole
    for ranks in ((whole, spoilt), (spoilt, whole)):
        with pytest.raises(UserError) as caught:
            waited_for(monkeypatch, *ranks)
        assert not isinstance(caught.value, ClusterError), "a restart would make the same weights again"
        said = str(caught.value)
        assert "\n" not in said
        assert said.startswith("step 12, with a learning rate of 0.5, made weights that are infinite or not a number")
        assert "lower optimizer.learning_rate or optimizer.max_grad_norm" in said


def test_an_update_that_was_left_out_is_one_line_with_the_prompts_of_all_ranks(monkeypatch, capsys):
    names = "train/11/0 (a.png)", "train/11/1 (b\n\x1b[2Jc.png)"
    learned = waited_for(
        monkeypatch, LearnerStats(skipped=1, not_finite=names[:1]), LearnerStats(skipped=1, not_finite=names)
    )
    assert (learned.skipped, learned.not_finite) == (1, names)
    assert capsys.readouterr().out == (
        "WARNING: step 12: 1 update left out on all learners, because the loss was infinite or not a number in the "
        "micro-batches with the prompts train/11/0 (a.png), train/11/1 (b\\n\\x1b[2Jc.png)\n"
    )


def test_of_many_prompts_some_are_named(monkeypatch, capsys):
    waited_for(monkeypatch, LearnerStats(skipped=2, not_finite=tuple(f"train/11/{i} (a.png)" for i in range(11))))
    said = capsys.readouterr().out
    assert "2 updates left out" in said
    assert said.endswith(", train/11/7 (a.png) and 3 more\n")


def test_a_gradient_that_overflowed_names_no_prompt(monkeypatch, capsys):
    waited_for(monkeypatch, LearnerStats(skipped=1))
    assert "the gradient was infinite or not a number, and the loss was finite\n" in capsys.readouterr().out
    waited_for(monkeypatch, LearnerStats())
    assert capsys.readouterr().out == ""
