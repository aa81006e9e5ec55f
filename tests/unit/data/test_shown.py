"""Images as they are kept for a run: read one by one, no larger than the model looks at them, with nothing lost."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset
from rft_cluster.data.images import image_sha256, open_image, pixel_digest
from rft_cluster.data.shown import View, kept_size

SIDE = 28


SMALL = View(0, lambda width, height: (SIDE, SIDE))  # of a model that looks at 28 pixels a side


def photo(seed: int, width: int = 300, height: int = 200, **how) -> bytes:
    """Noise, which JPEG hardly makes smaller."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95, **how)
    return file.getvalue()


def folder_of(root, images: int, **how):
    for i in range(images):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i, **how))
    return DataSection(source="folder", path=root, shots=images // 2 - 1, validation=0, test=2)


def test_a_large_image_is_kept_as_small_as_the_model_looks_at_it(tmp_path):
    dataset = load_dataset(folder_of(tmp_path, 6), 0, SMALL)
    for example in (*dataset.train, *dataset.test):
        file = (tmp_path / example.example_id).read_bytes()
        assert example.image.sha256 == image_sha256(file), "it is known by its file"
        kept = Image.open(io.BytesIO(dataset.image(example)))
        assert np.array_equal(np.asarray(kept), np.asarray(open_image(file).resize((SIDE, SIDE))))
        # Whether it was trained on is asked of the whole picture, as ever.
        assert dataset.pixels_of(example) == pixel_digest(open_image(file))


def test_a_turned_photograph_is_kept_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    config = folder_of(tmp_path, 4, exif=exif)
    dataset = load_dataset(config, 0, View(40 * 40, lambda width, height: (20, 30) if width < height else (30, 20)))
    assert {Image.open(io.BytesIO(image)).size for image in dataset.images.values()} == {(20, 30)}


@pytest.mark.parametrize("to", [(300, 200), (400, 300), (0, 28)])
def test_an_image_stays_as_it_is_where_the_model_looks_at_no_smaller_one(tmp_path, to):
    dataset = load_dataset(folder_of(tmp_path, 4), 0, View(0, lambda *size: to))
    assert all(dataset.image(e) == (tmp_path / e.example_id).read_bytes() for e in dataset.train)


def test_an_image_is_kept_larger_where_the_model_would_enlarge_what_it_made_smaller():
    """Qwen2-VL's sizes for a fixed number of pixels: 4:3 becomes 112x84, and 112x84 becomes 140x112."""

    def size(width: int, height: int) -> tuple[int, int]:
        return (112, 84) if width * height > 112 * 112 else (140, 112)

    assert kept_size(4000, 3000, View(112 * 112, size)) == (224, 168)
    assert kept_size(224, 168, View(112 * 112, size)) == (224, 168)
    assert kept_size(100, 75, View(112 * 112, size)) == (100, 75)


def test_an_image_stays_as_it_is_where_it_takes_fewer_bytes(tmp_path):
    config = folder_of(tmp_path, 4)
    dataset = load_dataset(config, 0, View(300 * 200 - 1, lambda width, height: (299, 199)))
    assert all(dataset.image(e) == (tmp_path / e.example_id).read_bytes() for e in dataset.train)


def peak_of(root, images: int) -> int:
    """Bytes, the most at once while so many photographs of 100 kB are read."""
    config = folder_of(root, images)
    load_dataset(config, 0, SMALL)  # what is imported on the way counts for nothing
    tracemalloc.start()
    load_dataset(config, 0, SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_photographs(tmp_path):
    few, many = peak_of(tmp_path / "few", 4), peak_of(tmp_path / "many", 24)
    assert len(photo(0)) > 60_000
    assert many - few < 20 * 10_000, "what is kept of each, and not its file"


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    """Between the choice, which looks at its pixels, and the reading of those that are kept."""
    config = folder_of(tmp_path, 4)

    def changing(width: int, height: int) -> tuple[int, int]:
        """Asked first about an image of class a."""
        (tmp_path / "b/3.jpg").write_bytes(photo(77))
        return SIDE, SIDE

    with pytest.raises(UserError, match=r"^b/3.jpg changed while the data set was being read"):
        load_dataset(config, 0, View(0, changing))
