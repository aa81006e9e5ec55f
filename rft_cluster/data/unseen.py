"""Classes that are tested and not trained (`data.unseen_classes`)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import nearest
from rft_cluster.config import AlsoSection, DataSection
from rft_cluster.data.dataset import LISTED, FewShotDataset, composed, listing
from rft_cluster.data.names import PREFIX


def with_unseen(found: Sequence[str], held_out: Iterable[str], config: DataSection) -> list[str]:
    """The source's classes: those `found` among training images, then those of `config.unseen_classes` that only the
    labels `held_out` have, because a class that is not trained needs no training images."""
    unseen = set(map(composed, config.unseen_classes))
    return [*found, *(label for label in sorted(set(held_out) - set(found)) if _name(label, config) in unseen)]


def _name(label: str, config: DataSection) -> str:
    """The class's name in the run, after `data.strip_prefix`."""
    label = composed(label)
    prefixed = PREFIX.fullmatch(label) if config.strip_prefix else None
    return prefixed[2] if prefixed else label


def without_unseen(dataset: FewShotDataset, config: DataSection) -> FewShotDataset:
    """The data set without the training and validation images of `config.unseen_classes`.

    Images are left out after the splits were drawn, so a run with unseen classes has the test images of the run
    without: the two can be compared image by image. The pool, too, is that of the run without: validation images stay
    outside.

    Raises:
        UserError: an unseen class is none of the classes or has no test image, fewer than two classes are left, or
            no test image is of a class with training images.
    """
    if not config.unseen_classes:
        return dataset if isinstance(config, AlsoSection) else _with_seen_test(dataset)  # that has no baselines
    unseen = _checked([composed(label) for label in config.unseen_classes], dataset.classes)
    train, validation = (
        [example for example in split if example.label not in unseen] for split in (dataset.train, dataset.validation)
    )
    tested = {example.label for example in dataset.test}
    if dataset.test and (missing := [repr(label) for label in unseen if label not in tested]):
        raise UserError(
            f"data.unseen_classes: the test has no images of these classes; add images, raise data.test, or "
            f"lower data.shots:\n{listing(missing)}"
        )
    remark = (
        f"{len(unseen)} of {len(dataset.classes)} classes are tested and not trained ({', '.join(map(repr, unseen))}): "
        f"{len(dataset.train) - len(train)} of their images to learn from and "
        f"{len(dataset.validation) - len(validation)} for validation are left out"
    )
    dropped = [one.example_id for one in dataset.validation if one.label in unseen]
    left_out = tuple(dict.fromkeys([*dataset.left_out, *dropped]))
    remarks = [*dataset.remarks, remark]
    return _with_seen_test(replace(dataset, train=train, validation=validation, left_out=left_out, remarks=remarks))


def _with_seen_test(dataset: FewShotDataset) -> FewShotDataset:
    """The data set, if a test image is of a class with training images. Baselines can name no other class, so the end
    of the run would have nothing to compare the policy with."""
    if dataset.test and not dataset.seen_test:
        unseen, tested = dataset.unseen, {example.label for example in dataset.test}
        theirs = ", ".join([repr(label) for label in unseen if label in tested][:LISTED])
        others = ", ".join([repr(label) for label in dataset.classes if label not in unseen][:LISTED])
        raise UserError(
            f"data.test: all {len(dataset.test)} test images are of classes that are not trained ({theirs}), but the "
            f"baselines and the verdict are about the others ({others}): add test images of one of these, or raise "
            f"data.test"
        )
    return dataset


def _checked(unseen: list[str], classes: list[str]) -> list[str]:
    for label in unseen:
        if label not in classes:
            near = nearest(label, classes)
            cure = f"did you mean {near!r}?" if near else f"there are {', '.join(map(repr, classes[:LISTED]))}"
            raise UserError(f"data.unseen_classes: {label!r} is none of the classes; {cure}")
    left = len(classes) - len(set(unseen))
    if left < 2:
        raise UserError(
            f"data.unseen_classes names {len(set(unseen))} of {len(classes)} classes, and training needs two others at "
            f"least: name {max(0, len(classes) - 2)} at most"
        )
    return [label for label in classes if label in unseen]
