"""Looks of images by hand, and groups of what looks alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from rft_cluster.model.tiny.look_alike import COLOUR, DIRECTIONS, SIDE, Looks, _parts, look_alike_groups, strokes
from rft_cluster.model.tiny.warm_start import Pool
from tests.unit.model.test_tiny import picture

CELLS = 8
SQUARE = [index for index in range(80) if index % 5]  # the others are wider than high


def stack(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def histograms(grey: np.ndarray) -> np.ndarray:
    """[cells down, cells right, directions]"""
    (found,) = strokes(torch.from_numpy(grey).float()[None])
    assert found.shape == (DIRECTIONS, CELLS, CELLS)
    return found.permute(1, 2, 0).numpy()


def test_an_upright_edge_is_one_direction_in_the_cells_beside_it():
    grey = np.zeros((SIDE, SIDE))
    grey[:, 16:] = 1.0
    # Columns 15 and 16 have the gradient 1, in the four rows of each cell.
    expected = np.zeros((CELLS, CELLS, DIRECTIONS))
    expected[:, 3:5, 0] = np.sqrt(4.0)
    np.testing.assert_allclose(histograms(grey), expected, atol=1e-6)
    np.testing.assert_allclose(histograms(1.0 - grey), expected, atol=1e-6)  # light on dark as dark on light


def test_a_slope_between_two_directions_counts_for_both():
    rows, columns = np.indices((SIDE, SIDE))
    # Half of the right angle is 2.25 of nine directions over 180 degrees; 16 pixels of length 2/64 * sqrt(2).
    inner = np.square(histograms((rows + columns) / 64.0)[1:-1, 1:-1])
    whole = 16 * np.sqrt(2) * 2 / 64
    np.testing.assert_allclose(inner[..., 2], 0.75 * whole, rtol=1e-4)
    np.testing.assert_allclose(inner[..., 3], 0.25 * whole, rtol=1e-4)
    assert np.abs(inner[..., [0, 1, 4, 5, 6, 7, 8]]).max() < 1e-6
    steep = histograms((columns - rows * np.tan(np.radians(5))) / 640.0)  # 175 degrees: between the last and the first
    steep = np.square(steep[3, 3])
    assert steep[8] / steep[0] == pytest.approx(0.25 / 0.75, rel=1e-3)  # 8.75 directions
    assert steep[1:8] == pytest.approx(np.zeros(7), abs=1e-6)


def test_gradients_are_as_many_as_one_by_one():
    generator = np.random.default_rng(0)
    grey = generator.random((SIDE, SIDE))
    expected = np.zeros((CELLS, CELLS, DIRECTIONS))
    for row in range(SIDE):
        for column in range(SIDE):
            down = grey[row + 1, column] - grey[row - 1, column] if 0 < row < SIDE - 1 else 0.0
            right = grey[row, column + 1] - grey[row, column - 1] if 0 < column < SIDE - 1 else 0.0
            angle = np.degrees(np.arctan2(down, right)) % 180 / 20
            cell = expected[row // 4, column // 4]
            cell[int(angle) % 9] += np.hypot(down, right) * (1 - angle % 1)
            cell[(int(angle) + 1) % 9] += np.hypot(down, right) * (angle % 1)
    np.testing.assert_allclose(histograms(grey), np.sqrt(expected), atol=1e-4)


def test_strokes_hardly_change_when_a_drawing_moves_and_pixels_do():
    grey = np.zeros((SIDE, SIDE))
    grey[6:26, 13] = 1.0
    other = np.zeros((SIDE, SIDE))
    other[13, 6:26] = 1.0
    moved = np.roll(grey, 1, axis=1)

    def apart(one: np.ndarray, two: np.ndarray) -> float:
        return float(np.linalg.norm(one - two))

    by_strokes = apart(histograms(grey), histograms(moved)) / apart(histograms(grey), histograms(other))
    assert by_strokes < 0.5 < 0.9 < apart(grey, moved) / apart(grey, other)


def test_plain_colours_differ_though_they_are_equally_light():
    images = [Image.new("RGB", (20, 20), colour) for colour in ((100, 100, 100), (200, 62, 32), (32, 105, 250))]
    grey, colours = _parts(stack(images))
    assert grey.abs().max() < 1e-3
    assert torch.cdist(colours, colours).fill_diagonal_(9).min() > 1


def test_strokes_and_colours_have_their_weights_and_components_unit_deviation():
    pool = stack([picture(index) for index in SQUARE])
    looks = Looks([pool[:20], pool[20:]], seed=0)
    together = looks._together(*_parts(pool))
    shape = CELLS * CELLS * DIRECTIONS
    assert float(together[:, :shape].var(0, correction=0).sum()) == pytest.approx(1, rel=1e-3)
    assert float(together[:, shape:].var(0, correction=0).sum()) == pytest.approx(COLOUR**2, rel=1e-3)
    np.testing.assert_allclose(looks(pool).std(0).numpy(), 1, rtol=1e-2)
    np.testing.assert_allclose(looks(pool).mean(0).numpy(), 0, atol=1e-3)
    # The components of the pool are those of its images, and distances between looks are kept but for what is left out.
    ratio = looks.pool / looks(pool)
    np.testing.assert_allclose(ratio.numpy(), np.tile(ratio[0].numpy(), (len(pool), 1)), rtol=1e-2)
    assert float(torch.cdist(looks.pool, looks.pool).mean() / torch.cdist(together, together).mean()) > 0.8


def test_an_image_that_moved_looks_another_way():
    pool = stack([picture(index) for index in SQUARE])
    looks = Looks([pool], seed=0)
    moved = looks(pool.roll(3, dims=3))
    assert float((moved - looks(pool)).abs().mean()) > 0.1
    torch.testing.assert_close(looks(pool[:3]), looks(pool)[:3], rtol=1e-3, atol=1e-4)  # whatever else is in the batch


def test_look_alikes_share_their_words():
    kinds = [index % 4 for index in SQUARE]
    looks = Looks([stack([picture(index) for index in SQUARE])], seed=0).pool.numpy()
    places, words = look_alike_groups(looks, classes=4, seed=0)
    assert len(places) == len(words) == len(kinds)
    assert np.isfinite(places).all()
    for position in (0, 1):
        owner: dict[str, set[int]] = {}
        for pair, kind in zip(words, kinds, strict=True):
            owner.setdefault(pair[position], set()).add(kind)
        assert all(len(found) == 1 for found in owner.values()), "a group of two kinds"


def test_images_that_are_all_the_same_give_numbers():
    pool = Pool([Image.new("RGB", (20, 20), "grey")] * 12, classes=2, pixels=56 * 56, side=28, seed=0)
    seen = pool.draw(np.random.default_rng(0), 5).seen
    assert seen.shape == (5, pool.values) and len(pool.words) == 12
    assert float(seen.abs().max()) <= 10


def test_of_plain_colours_rounding_is_not_taken_for_strokes():
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (40, 3))
    pool = stack([Image.new("RGB", (20, 20), tuple(map(int, colour))) for colour in colours])
    looks = Looks([pool], seed=0)
    shape = CELLS * CELLS * DIRECTIONS
    together = looks._together(*_parts(pool))
    assert float(together[:, :shape].var(0).sum()) < 0.1 * COLOUR**2
    # So the nearest looks are the nearest colours.
    far = torch.cdist(torch.tensor(colours).float(), torch.tensor(colours).float()).fill_diagonal_(999)
    assert (torch.cdist(looks.pool, looks.pool).fill_diagonal_(999).argmin(1) == far.argmin(1)).float().mean() > 0.9


def test_each_image_keeps_its_words_and_its_place_when_sizes_differ():
    images = [picture(index) for index in range(40)]
    kinds = [index % 4 for index in range(40)]
    pool = Pool(images, classes=4, pixels=56 * 56, side=28, seed=0)
    by_words: dict[tuple[str, str], list[int]] = {}
    for words, kind in zip(pool.words, kinds, strict=True):
        by_words.setdefault(words, []).append(kind)
    most = [max(found.count(kind) for kind in set(found)) for found in by_words.values()]
    assert sum(most) >= 36  # of 40 images are with their own kind
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(10):
        drawn = pool.draw(rng, 8)
        assert drawn.seen.shape == (8, pool.values)
        height, width = drawn.images.shape[2:]
        sizes.add((height, width))
        for thought, seen in zip(drawn.thoughts, drawn.seen, strict=True):
            (index,) = [row for row, place in enumerate(pool._places) if torch.equal(place, seen[: len(place)])]
            assert thought == " ".join(pool.words[index])
            assert (images[index].width > images[index].height) == (width > height)
    assert len(sizes) == 2
