from rft_cluster.actors import combined, deal


def test_prompts_are_dealt_evenly_and_in_turns():
    assert deal({"a": 0, "b": 0, "c": 0}, 7) == {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}


def test_a_generator_that_is_behind_gets_fewer():
    # b has 3 left: a takes 0 to 2, then they take turns, the first of equals first.
    assert deal({"a": 0, "b": 3}, 6) == {"a": [0, 1, 2, 3, 5], "b": [4]}


def test_none_goes_to_one_that_is_far_behind():
    assert deal({"a": 0, "b": 90}, 8) == {"a": list(range(8))}
    assert deal({"a": 0}, 0) == {}


def test_what_the_ranks_say_is_summed_or_common_or_the_largest():
    same = {"grad_norm": 0.5, "learning_rate": 1e-6, "skipped": 1.0}
    assert combined(
        [
            {"tokens": 3.0, "loss": -1.0, "memory_gib": 2.0, "activation_gib": 1.5, **same},
            {"tokens": 4.0, "loss": 0.25, "memory_gib": 5.0, "activation_gib": 0.5, **same},
        ]
    ) == {"tokens": 7.0, "loss": -0.75, "memory_gib": 5.0, "activation_gib": 1.5, **same}
