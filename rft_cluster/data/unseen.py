"""Classes that are tested and not trained (`data.unseen_classes`)."""

from dataclasses import replace

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import nearest
from rft_cluster.config import DataSection
from rft_cluster.data.dataset import LISTED, FewShotDataset, composed, listing


def without_unseen(dataset: FewShotDataset, config: DataSection) -> FewShotDataset:
    """The data set without the training and validation images of `config.unseen_classes`.

    Images are left out after the splits were drawn, so a run with unseen classes has the test images of the run
    without: the two can be compared image by image. The pool, too, is that of the run without: validation images stay
    outside.

    Raises:
        UserError: an unseen class is none of the classes or has no test image, or fewer than two classes are left.
    """
    if not config.unseen_classes:
        return dataset
    unseen = _checked([composed(label) for label in config.unseen_classes], dataset.classes)
    train, validation = (
        [example for example in split if example.label not in unseen] for split in (dataset.train, dataset.validation)
    )
    tested = {example.label for example in dataset.test}
    if dataset.test and (missing := [repr(label) for label in unseen if label not in tested]):
        raise UserError(
            f"data.unseen_classes: the test has no images of these classes; add images, or raise data.test:\n"
            f"{listing(missing)}"
        )
    remark = (
        f"{len(unseen)} of {len(dataset.classes)} classes are tested and not trained ({', '.join(map(repr, unseen))}): "
        f"{len(dataset.train) - len(train)} of their images to learn from and "
        f"{len(dataset.validation) - len(validation)} for validation are left out"
    )
    dropped = [one.example_id for one in dataset.validation if one.label in unseen]
    left_out = tuple(dict.fromkeys([*dataset.left_out, *dropped]))
    return replace(dataset, train=train, validation=validation, left_out=left_out, remarks=[*dataset.remarks, remark])


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
