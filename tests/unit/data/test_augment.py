"""Random changes of training images."""

import numpy as np
import pytest
from PIL import Image

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection, load_config
from rft_cluster.config.data import AugmentSection
from rft_cluster.data import load_dataset
from rft_cluster.data.augment import augmented, draw
from rft_cluster.data.dataset import seeded_generator
from rft_cluster.messages import Augmentation

ALL = AugmentSection(crop=0.2, flip=True, rotation=10, colour=0.3)
NOTHING = Augmentation((0, 0, 1, 1), False, 0.0, (1, 1, 1))
PICTURE = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))


def pixels(**changes) -> np.ndarray:
    return np.asarray(augmented(PICTURE, Augmentation(**{**{f: getattr(NOTHING, f) for f in FIELDS}, **changes})))


FIELDS = ("crop", "flip", "rotation", "colour")


def test_each_change_does_what_its_name_says():
    whole = np.asarray(PICTURE)
    assert augmented(PICTURE, None) is PICTURE and (pixels() == whole).all()
    assert (pixels(flip=True) == whole[:, ::-1]).all()
    assert (pixels(rotation=180.0) == whole[::-1, ::-1]).all()
    assert (pixels(colour=(0.0, 1, 1)) == 0).all()  # brightness 0 is black
    quarter = pixels(crop=(0.5, 0.5, 1, 1))  # the lower right quarter, at the size of the whole
    assert quarter.shape == whole.shape and quarter.min() >= whole[3:, 4:].min() - 12
    grey = pixels(colour=(1, 1, 0.0))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()


def test_corners_of_a_turned_image_have_the_colour_of_its_edge():
    plain = Image.new("RGB", (9, 9), (200, 100, 50))
    turned = np.asarray(augmented(plain, Augmentation((0, 0, 1, 1), False, 45.0, (1, 1, 1))))
    assert (turned == (200, 100, 50)).all()


def test_draws_stay_within_what_was_asked_and_depend_on_the_key_alone():
    drawn = [draw(ALL, seeded_generator(0, step)) for step in range(200)]
    assert drawn == [draw(ALL, seeded_generator(0, step)) for step in range(200)] and len(set(drawn)) == 200
    for one in drawn:
        left, top, right, bottom = one.crop
        assert 0 <= left < right <= 1 + 1e-9 and 0 <= top < bottom <= 1 + 1e-9
        assert right - left >= 0.8 and bottom - top >= 0.8 and abs(one.rotation) <= 10
        assert all(0.7 <= factor <= 1.3 for factor in one.colour)
    assert 70 < sum(one.flip for one in drawn) < 130
    assert max(one.rotation for one in drawn) > 9 and min(one.crop[2] - one.crop[0] for one in drawn) < 0.81


def test_switching_one_on_does_not_change_the_others():
    for name in FIELDS:
        alone = draw(AugmentSection(**{name: getattr(ALL, name)}), seeded_generator(7))
        together = draw(ALL, seeded_generator(7))
        for field in FIELDS:
            assert getattr(alone, field) == getattr(together if field == name else NOTHING, field)
    assert draw(AugmentSection(), seeded_generator(7)) is None


def test_training_images_alone_are_changed_anew_in_each_step_and_the_same_again_on_resuming():
    section = DataSection(source="digits", shots=1, validation=5, test=5, augment=ALL)
    dataset, plain = load_dataset(section, 0), load_dataset(section.model_copy(update={"augment": AugmentSection()}), 0)
    batch = dataset.batch(0, 3, 20)  # two epochs of ten images
    assert [one.changed(None) for one in plain.batch(0, 3, 20)] == plain.batch(0, 3, 20)
    assert [one.example_id for one in batch] == [one.example_id for one in plain.batch(0, 3, 20)]
    drawn = {one.image.augmentation for one in batch}
    assert len(drawn) == 20 and None not in drawn
    assert batch == dataset.batch(0, 3, 20) != dataset.batch(0, 5, 20)
    assert dataset.splits == plain.splits  # evaluations ask about the splits


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.augment.crop=2", "data.augment.crop: Input should be less than or equal to 0.9, got 2"),
        ("data.augment.rotate=5", "data.augment.rotate: unknown key; did you mean data.augment.rotation"),
    ],
)
def test_wrong_ones_are_refused(override, said):
    with pytest.raises(UserError) as told:
        load_config("digits", [override])
    assert said in str(told.value)


def test_both_ways_of_writing_it():
    written = load_config("digits", ["data.augment={crop: 0.1, flip: true}"]).data.augment
    assert written == load_config("digits", ["data.augment.crop=0.1", "data.augment.flip=true"]).data.augment
    assert (written.crop, written.flip, written.rotation, written.colour) == (0.1, True, 0, 0)
