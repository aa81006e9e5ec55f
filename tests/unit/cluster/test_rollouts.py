from rft_cluster.cluster.rollouts import assign


def test_prompts_are_assigned_evenly_and_in_turns():
    assert assign({"a": 0, "b": 0, "c": 0}, 7, size=8, most=99) == {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}


def test_a_generator_that_is_behind_gets_fewer():
    # b has 3 prompts of 8 left: a takes 0 to 2, then they take turns, the first of equals first.
    assert assign({"a": 0, "b": 24}, 6, size=8, most=99) == {"a": [0, 1, 2, 3, 5], "b": [4]}


def test_none_goes_to_one_that_is_far_behind():
    assert assign({"a": 0, "b": 90}, 8, size=1, most=99) == {"a": list(range(8))}
    assert assign({"a": 0}, 0, size=1, most=99) == {}


def test_nobody_gets_more_than_there_is_room_for():
    # a takes two and is level with b, takes one more, and then b has room for one.
    assert assign({"a": 0, "b": 16, "c": 24}, 9, size=8, most=24) == {"a": [0, 1, 2], "b": [3]}
    assert assign({"a": 17, "b": 24}, 9, size=8, most=24) == {}


def test_one_that_has_nothing_gets_even_a_group_that_is_larger_than_its_room():
    assert assign({"a": 0, "b": 1}, 3, size=8, most=4) == {"a": [0]}
