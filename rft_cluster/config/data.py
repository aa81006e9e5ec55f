"""The section `data`: which images are learned, and which the policy is tested on."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rft_cluster.config.base import FilePath, Section
from rft_cluster.config.bounds import MOST_BYTES, MOST_DECODED, MOST_IMAGES

Level = Annotated[int, Field(ge=-65_536, le=65_535)]  # a value of 16 bits, signed or unsigned


class AugmentSection(Section):
    """Random changes of training images, drawn anew for each prompt from (`run.seed`, step, index in the step)."""

    crop: float = Field(0, ge=0, le=0.9)
    """Largest share of width and of height that is cut off; the rest is scaled to the size of the whole. 0: none."""
    flip: bool = False
    """Mirror half of the images left to right. Wrong where a side matters, as in digits and letters."""
    rotation: float = Field(0, ge=0, le=180)
    """Degrees, the largest turn to either side. Corners get the mean colour of the image's edge. 0: none."""
    colour: float = Field(0, ge=0, le=1)
    """Largest change of brightness, contrast and saturation: with 0.2 each is multiplied by 0.8 to 1.2. 0: none."""

    @property
    def recurs(self) -> bool:
        """Whether an image has so few augmentations that they come again: two with `flip` alone."""
        return not (self.crop or self.rotation or self.colour)


class DataSection(Section):
    source: str
    """`digits` (built in), `folder` (a sub-folder of images for each class), `csv` (a table of images and labels),
    `huggingface` (a data set of the hub or on disk), `flower102` (the official archive of Oxford 102 Flowers, with its
    splits), or a function's dotted path."""
    path: FilePath | None = None
    """The folder; for `csv` the table or the folder that holds it; for `huggingface` a folder, a parquet file or a
    name on the hub, e.g. `laolao77/ViRFT_CLS_flower_4_shot`."""
    images: FilePath | None = None
    """For `csv` only: the folder with the pictures, if they are not beside or below the table."""
    image_column: str | None = None
    label_column: str | None = None
    """Both for `csv` and `huggingface`. Left out, they are guessed if only one column fits."""
    splits: dict[Literal["train", "validation", "test"], str] = Field({})
    """The source's names of the splits, if they are none of the usual words for train, validation and test: folders
    (`folder`), splits (`huggingface`) or values of the split column (`csv`)."""
    held_out: FilePath | None = None
    """For `huggingface` only: an official Flower102 archive. Validation and test images are drawn from it if the set
    has only training images."""
    download: bool = False
    """For `flower102` without `path`, and for `huggingface` without `held_out`: fetch the official Flower102 archive
    (345 MB), once, before any actor starts, to `~/.cache/rft_cluster/flowers102`."""
    classes: list[str] | None = None
    """The label set; left out, that of the source. Also gives names to integer labels."""
    only: list[str] | None = None
    """Classes to use. Images of other classes are left out."""
    unseen_classes: list[str] = Field([])
    """Classes that are tested and not trained, e.g. `[eight, nine]`: what the policy makes of what it was never shown.
    Their images are left out of training and validation, and their names out of training's prompts; a question of the
    test that lists the classes lists all. Test images are the same as without this key; a class with fewer images
    than `shots`, or with none to learn from, is only tested. The unlabelled pool stays whole."""
    strip_prefix: bool = False
    """Remove the number or code at the start of every class name: `001.Black_footed_Albatross`."""
    aliases: dict[str, list[str]] = Field({})
    """Other correct names of a label, e.g. `{t-shirt: [tee]}`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """`error`: list all unusable images and do not start. `skip`: leave them out."""
    on_conflict: Literal["error", "skip"] = "error"
    """For pictures with two labels. `error`: list all of them and do not start. `skip`: leave out every copy."""
    max_pixels: int = Field(89_478_485, ge=28 * 28, le=MOST_DECODED)
    max_bytes: int = Field(50_000_000, ge=1, le=MOST_BYTES)
    """Larger images are refused before they are decoded. Decoding takes up to 4 bytes a pixel."""
    sixteen_bit: Literal["auto", "full"] | tuple[Level, Level] = "auto"
    """The values shown as black and white, for pictures with 16 bits a channel. `auto`: powers of two that enclose all
    values of the set. `full`: 0 and 65535. Or two values, e.g. `[-160, 240]`, a window of a CT."""
    manifest: FilePath | None = None
    """The `manifest.json` of an earlier run, whose images are used. Replaces `shots`, `validation` and `test`."""
    shots: int = Field(4, ge=1, le=MOST_IMAGES)
    """Labelled images a class to learn from."""
    augment: AugmentSection = AugmentSection()
    """Random changes of training images. All completions of a prompt are about the same changed image, and learners
    train on that. Images of validation and test are never changed."""
    validation: int = Field(200, ge=0, le=MOST_IMAGES)
    """Images for evaluations during training, drawn from the rest. On 50 or more, probabilities are calibrated."""
    test: int = Field(500, ge=0, le=MOST_IMAGES)
    """Images for the evaluations before and after training, and for nothing else. 0: none are made."""
    folds: int = Field(0, ge=0, le=100)
    """Number of folds for cross-validation, for sets too small for a test split: one training a fold, each tested on
    its own share of all images. Replaces `test`. 0: no cross-validation."""
    fold: int = Field(0, ge=0, le=100)
    """The fold to test, from 1. 0: all folds, one after the other."""

    @field_validator("path", "images", "held_out", "manifest", mode="before")
    @classmethod
    def _no_url(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError("nothing is fetched from a URL: download it, or name a set on the hub as owner/name")
        return value

    @model_validator(mode="after")
    def _keys_have_a_reader(self) -> "DataSection":
        built_in = ("digits", "folder", "csv", "huggingface", "flower102")
        readers = {"held_out": ["huggingface"], "images": ["csv"], "splits": ["folder", "csv", "huggingface"]}
        readers["download"] = ["huggingface", "flower102"]
        given: dict[str, Any] = {"held_out": self.held_out, "images": self.images, "splits": self.splits or None}
        given["download"] = self.download or None
        for key, value in given.items():
            if value is not None and self.source in built_in and self.source not in readers[key]:
                sources = " and ".join(readers[key])
                raise ValueError(f"{key} is for source {sources} only, source is {self.source}: leave it out")
        return self

    @model_validator(mode="after")
    def _numbers_agree(self) -> "DataSection":
        if self.folds == 1 or self.fold > self.folds:
            raise ValueError(f"folds is {self.folds} and fold {self.fold}: folds must be 2 or more, fold at most that")
        if self.unseen_classes and self.folds:
            raise ValueError("unseen_classes and folds do not go together: leave one of them out")
        if self.unseen_classes and not self.test:
            raise ValueError("unseen_classes are tested and not trained, and test is 0: set it to 1 or more")
        if isinstance(self.sixteen_bit, tuple) and self.sixteen_bit[0] >= self.sixteen_bit[1]:
            raise ValueError(f"sixteen_bit is {list(self.sixteen_bit)}: black must be below white")
        return self


class AlsoSection(DataSection):
    """Another data set, with the keys of `data`."""

    subject: str = "object"
    """What its images show. They are asked about by `prompt.template`, with this subject and their own classes."""
    test: int = Field(200, ge=1, le=MOST_IMAGES)
    """How many of its images are asked about, drawn by `run.seed`."""
    validation: int = Field(0, ge=0, le=0)
    """Nothing is chosen by this data set."""
    shots: int = Field(1, ge=1, le=1)
    """Nothing is learned from this data set. One image of each class is set apart all the same."""

    @model_validator(mode="after")
    def _only_tested(self) -> "AlsoSection":
        for key in ("folds", "fold", "unseen_classes", "augment"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is about training, and this data set is only tested: leave it out")
        return self
