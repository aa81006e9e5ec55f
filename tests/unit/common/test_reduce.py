from rft_cluster.common.reduce import largest, reduced
from rft_cluster.messages import CompletionGap, LearnerStats


def test_what_the_ranks_say_is_summed_or_the_largest_as_each_field_says():
    same = {"grad_norm": 0.5, "learning_rate": 1e-6, "skipped": 1}
    one, other = CompletionGap("train/0/1", 3, 0.25), CompletionGap("train/0/0", 0, 0.5)
    ranks = [
        LearnerStats(tokens=3, loss=-1.0, entropy=2.0, logprob_gaps=(one,), memory_gib=2.0, activation_gib=1.5, **same),
        LearnerStats(
            tokens=4, loss=0.25, entropy=1.0, logprob_gaps=(other,), memory_gib=5.0, activation_gib=0.5, **same
        ),
    ]
    assert reduced(ranks) == LearnerStats(
        tokens=7, loss=-0.75, entropy=3.0, logprob_gaps=(one, other), memory_gib=5.0, activation_gib=1.5, **same
    )
    assert reduced(ranks[:1]) == ranks[0]


def test_the_largest_of_what_is_known():
    assert (largest([None, 1.0, 0.5]), largest([None, None])) == (1.0, None)
