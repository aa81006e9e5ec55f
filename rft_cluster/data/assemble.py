"""Build a data set from labelled images: one part, or separate train, validation and test parts.

parts                          validation images from    test images from
train                          the rest after the shots  the rest after the shots
train, validation or test      that part                 that part
train, validation, test        validation                test
"""

from dataclasses import replace

from rft_cluster.common.errors import UserError
from rft_cluster.config import AlsoSection, DataSection
from rft_cluster.data.conflicts import conflicting
from rft_cluster.data.dataset import FewShotDataset, check_classes, listing
from rft_cluster.data.names import chosen_names, name_notes
from rft_cluster.data.reading import Labelled, Unread, look_at, skip_or_refuse
from rft_cluster.data.split import choose, dataset_of
from rft_cluster.data.unseen import with_unseen


def assemble(name: str, parts: dict[str, Unread], found: list[str], config: DataSection, seed: int) -> FewShotDataset:
    """Choose the few-shot splits. `parts` has the key "train", and "validation" and "test" where the source has them.

    `found` are the class names of the source's training images, in order. The result has `config.classes`, or the
    chosen and renamed classes. No image is in two splits.

    Raises:
        UserError: images cannot be used, the parts have different classes, or there are too few images.
    """
    found = with_unseen(found, [e.label for part in parts.values() for e in part.examples], config)
    names = chosen_names(found, config)
    classes = check_classes(list(names.values()), config.classes)
    for part in parts.values():
        unknown = sorted({e.label for e in part.examples} - set(found))
        if unknown:
            cures = "rename them as there, or remove them"
            if not isinstance(config, AlsoSection):
                cures = f"{cures}, or name them in data.unseen_classes to test them without training"
            raise UserError(
                f"data.path: {part.where} has classes that {parts['train'].where} has not; {cures}:\n"
                f"{listing(list(map(repr, unknown)))}"
            )
    parts = _without_conflicts({role: part.named(names) for role, part in parts.items()}, config)
    held_out = {role: part for role, part in parts.items() if role != "train"}
    if held_out and config.folds:
        raise UserError(
            f"data.folds is set, but {name} has {' and '.join(held_out)} images of its own: leave data.folds out"
        )
    own = _held_out_keys(held_out)
    whole = split_and_read(
        name, parts["train"], classes, replace_keys(config, validation=0, test=0) if own else config, seed
    )
    seen: dict[str, Labelled] = {}  # the first image of each digest
    _see(parts["train"], seen)
    for part, keys in own:
        copies = {
            e.example_id: seen[digest].example_id
            for e, digest in zip(part.examples, part.digests, strict=True)
            if digest in seen and e.example_id not in part.skipped
        }
        chosen = split_and_read(name, part.without(copies), classes, replace_keys(config, shots=0, **keys), seed)
        whole = whole.with_held_out(replace(chosen, copies=copies | chosen.copies))
        _see(part, seen)
    return replace(whole, remarks=name_notes(found, names))


def _see(part: Unread, seen: dict[str, Labelled]) -> None:
    for example, digest in zip(part.examples, part.digests, strict=True):
        if example.example_id not in part.skipped:
            seen.setdefault(digest, example)


def replace_keys(config: DataSection, **values: int) -> DataSection:
    """Set keys without validation: a part that is only for testing needs `shots=0`, which a user may not set."""
    return config.model_copy(update=values)


def _held_out_keys(held_out: dict[str, Unread]) -> list[tuple[Unread, dict[str, int]]]:
    """The keys to change for each held-out part: of two parts each gives only its own split."""
    if len(held_out) < 2:
        return [(part, {}) for part in held_out.values()]
    return [(held_out["validation"], {"test": 0}), (held_out["test"], {"validation": 0})]


def _without_conflicts(parts: dict[str, Unread], config: DataSection) -> dict[str, Unread]:
    pairs = [pair for part in parts.values() for pair in zip(part.examples, part.digests, strict=True)]
    conflicts = conflicting(pairs, config)
    return {
        role: replace(
            part,
            skipped=part.skipped
            | {e.example_id: conflicts[e.example_id] for e in part.examples if e.example_id in conflicts},
        )
        for role, part in parts.items()
    }


def split_and_read(name: str, images: Unread, classes: list[str], config: DataSection, seed: int) -> FewShotDataset:
    """Choose the splits of one part, and decode the chosen images that were not decoded before.

    With `config.on_bad_image` skip, bad images are excluded and the splits are drawn again, until every chosen image is
    good.

    Raises:
        UserError: as `few_shot_split`.
    """
    skipped, seen = dict(images.skipped), dict(images.seen)
    while True:
        chosen = choose(images.examples, images.digests, skipped, classes, config, seed)
        new = [e for split in chosen.splits for e in split if e.example_id not in seen]
        more, bad = look_at(new, images.read, config)
        skip_or_refuse(bad, f"{len(new)} images chosen from {images.where}", config)
        seen |= more
        skipped |= bad
        if not bad:
            return dataset_of(name, classes, chosen, seen, images.read, skipped)
