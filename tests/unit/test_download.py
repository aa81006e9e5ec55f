"""A launch of flower102 with its archive still to be downloaded."""

import io

import pytest
import torch
from PIL import Image
from torchvision.datasets import Flowers102

from rft_cluster import launch
from rft_cluster.data import official
from rft_cluster.data.archive import flower_classes
from rft_cluster.model.image_size import model_size
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.run.planned import grey_picture
from tests.unit.data.test_official import home, packed, server  # noqa: F401  (fixtures)

CPU = ("cluster.device=cpu", "generators.gpus=0", "learners.gpus=0", "generators.cpus=0.1", "learners.cpus=0.1")
DRY = pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])


def start(tmp_path, capsys, *arguments: str) -> tuple[int, str, str]:
    run = ["--config", "flower102", *CPU, f"run.folder={tmp_path / 'runs'}", *arguments]
    code = launch.main(run)
    printed = capsys.readouterr()
    assert not (tmp_path / "runs").exists(), "a run folder was left"
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny Qwen2-VL that was never trained, as an argument."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(flower_classes(), ["group-00", "kind-000"], "Which class of flower?", 56 * 56)
    build_model(processor.tokenizer).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"model.path={folder}"


def test_a_dry_run_names_the_test_set_and_downloads_nothing(server, tmp_path, capsys, model):  # noqa: F811
    code, printed, error = start(tmp_path, capsys, model, "--dry-run")
    assert (code, error) == (0, "")
    for line in (
        "flower102: 102 classes, 408 images to learn from, 200 for validation, 2463 for the test\n",
        "not here yet: the run first downloads 0 MB to ~/.cache/rft_cluster/flowers102 and checks the images",
        "schedule    204 steps; an epoch of 408 images is 25.5 steps\n",
        "for evaluations (9 x 200 validation, 2 x 2463 test images)",
    ):
        assert line in printed
    assert not server.asked and not official.CACHE.exists()


def test_a_dry_run_downloads_nothing_for_the_other_data_set_either(server, tmp_path, capsys, model):  # noqa: F811
    also = ["evaluation.also.source=flower102", "evaluation.also.download=true", "evaluation.also.subject=flower"]
    own = ["data.source=digits", "data.download=false", "data.test=20", "data.validation=10", "prompt.subject=digit"]
    code, printed, error = start(tmp_path, capsys, model, *also, *own, "schedule.prompts_per_step=8", "--dry-run")
    assert (code, error) == (0, "")
    assert "also tested before and after: flower102: 102 classes" in printed
    assert "not here yet: the run first downloads 0 MB" in printed
    assert not server.asked and not official.CACHE.exists()


@pytest.mark.usefixtures("home")
@DRY
def test_without_a_server_one_line_says_so_at_once(tmp_path, capsys, monkeypatch, dry_run):
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://127.0.0.1:9/")
    code, printed, error = start(tmp_path, capsys, "model.path=tiny", *dry_run)
    assert (code, printed) == (3, "")
    assert error.startswith("error: data.download: http://127.0.0.1:9/102flowers.tgz cannot be fetched")
    assert error.count("\n") == 1 and "set data.path" in error


@pytest.mark.parametrize(("pixels", "size"), [(401_408, (896, 448)), (28 * 28, (28, 28)), (7 * 28 * 28, (196, 28))])
def test_the_picture_in_place_of_others_has_the_most_tokens(pixels, size):
    picture = Image.open(io.BytesIO(grey_picture(pixels, 28)))
    assert picture.size == size
    assert model_size(*size, 28 * 28, pixels, 28) == size
