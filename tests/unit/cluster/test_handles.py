from rft_cluster.cluster.handles import combined


def test_what_the_ranks_say_is_summed_or_common_or_the_largest():
    same = {"grad_norm": 0.5, "learning_rate": 1e-6, "skipped": 1.0}
    assert combined(
        [
            {"tokens": 3.0, "loss": -1.0, "memory_gib": 2.0, "activation_gib": 1.5, **same},
            {"tokens": 4.0, "loss": 0.25, "memory_gib": 5.0, "activation_gib": 0.5, **same},
        ]
    ) == {"tokens": 7.0, "loss": -0.75, "memory_gib": 5.0, "activation_gib": 1.5, **same}
