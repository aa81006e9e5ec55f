"""Images that are deleted or replaced: in mid-run without effect, between run and resume refused by name."""

import signal
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from rft_cluster.data import FewShotDataset
from rft_cluster.data.images import open_image
from rft_cluster.data.manifest import read_manifest
from tests.faults.launched import check_records, command, finish, has_done, journal, start, written_again
from tests.faults.table import Row


@pytest.fixture
def photos(dataset: FewShotDataset, tmp_path: Path) -> Path:
    """A folder of images, with a folder a class: those of the digits."""
    folder = tmp_path / "photos"
    for number, example in enumerate([*dataset.train, *dataset.validation, *dataset.test]):
        file = folder / example.label / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        open_image(dataset.images[example.image.sha256]).save(file)
    return folder


@pytest.mark.timeout(900)
def test_an_image_that_is_gone_or_changed_is_named_by_the_resume_alone(photos, tmp_path, tiny_model):
    run = tmp_path / "mine"
    words = command(tmp_path, "mine", tiny_model, "data.source=folder", f"data.path={photos}")
    launch = start(words, run)
    launch.until(has_done(5), "step 5")
    ids = [entry["id"] for split in read_manifest(run / "manifest.json")["splits"].values() for entry in split]
    gone, changed = (photos / name for name in ids[:2])
    kept = [(file, file.read_bytes()) for file in (gone, changed)]
    gone.unlink()
    ImageOps.invert(Image.open(changed).convert("RGB")).save(changed)
    launch.until(has_done(7), "two steps more, without the images")
    launch.stop(signal.SIGKILL)
    written = journal(run)

    refused = start([*words, "--resume"], run)
    refused.ends(2)
    assert "Ray started" not in refused.text()
    told = refused.text().splitlines()
    assert told[0].startswith("error: ") and "some are gone or have changed" in told[0]
    assert [line.strip() for line in told[1:]] == [
        f"train: {ids[0]}: missing",
        f"train: {ids[1]}: its bytes have changed (another sha256)",
    ], refused.text()

    for file, content in kept:
        file.write_bytes(content)
    unused = next(file for file in sorted(photos.rglob("*.png")) if str(file.relative_to(photos)) not in ids)
    unused.unlink()  # concerns nobody
    finish([*words, "--resume"], run)
    check_records(run)
    assert not written_again(written, run)
    Row(18, "an image deleted, another replaced", "after step 5, and before the resume", ledger=True).write()
