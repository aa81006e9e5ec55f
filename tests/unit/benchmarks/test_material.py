"""The checks' material: where the model of true size is made."""

from benchmarks.gpu_check import material
from benchmarks.gpu_check.checklist import Bench


def test_the_model_is_made_once_and_leaves_nothing_on_the_gpu(monkeypatch, tmp_path):
    made = []

    def in_a_process(work, folder, device, environment):
        made.append((work, device))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(material, "in_a_process", in_a_process)
    bench = Bench("cuda", "true", tmp_path)
    assert material.model_folder(bench) == material.model_folder(bench) == tmp_path / "model-true"
    assert made == [(material.true_model, "cuda")]
    assert [file.name for file in tmp_path.glob("*/*")] == ["config.json"]
