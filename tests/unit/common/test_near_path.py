"""A path that is not there is answered with the one that was meant, wherever in it the slip is."""

import random
from pathlib import Path

import pytest

from rft_cluster.common.lookup import near_path

PARTS = ("home", "photos", "flowers", "train.csv")
SLIPS = {
    "a letter too few": lambda name, at: name[:at] + name[at + 1 :],
    "a letter too many": lambda name, at: name[:at] + "q" + name[at:],
    "another letter": lambda name, at: name[:at] + "q" + name[at + 1 :],
    "two letters changed about": lambda name, at: name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
    "capitals": lambda name, at: name.upper(),
}


def tree(root: Path) -> Path:
    file = root.joinpath(*PARTS)
    file.parent.mkdir(parents=True)
    file.touch()
    for folder in (root, *(root.joinpath(*PARTS[:depth]) for depth in range(1, len(PARTS)))):
        (folder / "unlike everything").touch()
    return file


@pytest.mark.parametrize("part", range(len(PARTS)), ids=PARTS)
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_any_part(tmp_path, slip, part):
    file, at = tree(tmp_path), random.Random(f"{slip}/{part}").randrange(len(PARTS[part]) - 1)
    typed = [*PARTS]
    typed[part] = SLIPS[slip](PARTS[part], at)
    if typed[part] != PARTS[part]:
        assert near_path(tmp_path.joinpath(*typed)) == f". Did you mean {file}?"


def test_nothing_is_said_where_nothing_is_alike(tmp_path):
    tree(tmp_path)
    assert near_path(tmp_path / "zzz") == ""
    assert near_path(tmp_path / "hom" / "zzz" / "train.csv") == ""  # the rest is not in home/
    assert near_path(tmp_path / "home" / "unlike everything" / "a.csv") == ""  # below a file


def test_what_is_there_has_no_neighbour(tmp_path):
    assert near_path(tree(tmp_path)) == ""


def test_of_several_the_one_in_which_the_rest_is(tmp_path):
    for name in ("photos1", "photos2"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos2" / "rose").mkdir()
    assert near_path(tmp_path / "photos" / "rose") == f". Did you mean {tmp_path / 'photos2' / 'rose'}?"


def test_a_name_from_a_disk_is_shown_safely(tmp_path):
    (tmp_path / "photos\x1b[2J").mkdir()
    assert "\x1b" not in near_path(tmp_path / "photos")
