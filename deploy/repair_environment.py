"""Repair an environment that has a CPU build of torch but CUDA builds of torchvision or torchaudio.

This happens if a package index has CPU builds only of torch. Packages that can be imported are not touched.

- torchvision fails with "operator torchvision::nms does not exist" in every process that imports it, also through vLLM
  and transformers. Nothing here calls the operator; only its schema must exist. This file is copied into site-packages
  with a `.pth` line that, in every process, declares the schema just before torchvision is imported.
- torchaudio fails to load its library, and transformers imports it if it is installed. It is not needed here, so it is
  uninstalled, and so is torchcodec.

    python deploy/repair_environment.py
"""

import sys


class _DeclareOperators:
    """A meta-path finder that acts on the first import of torchvision, and then removes itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._rft_torchvision_operators = library  # the declaration lives as long as this object
        return None


def activate() -> None:
    # A .pth file is read once for each entry of sys.path that leads to its folder.
    if not any(type(finder).__name__ == "_DeclareOperators" for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperators())


def _import_error(module: str) -> str:
    """The last line of what `import module` prints when it fails in a fresh process; empty if it works."""
    import subprocess

    command = [sys.executable, "-c", f"import torch, {module}"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return probe.stderr.strip().splitlines()[-1] if probe.returncode else ""


def repair() -> None:
    import importlib.util
    import shutil
    import subprocess
    import sysconfig
    from pathlib import Path

    error = _import_error("torchvision")
    if "torchvision::nms" in error:
        packages = Path(sysconfig.get_paths()["purelib"])
        shutil.copyfile(__file__, packages / "rft_torchvision_operators.py")
        (packages / "rft_torchvision_operators.pth").write_text(
            "import rft_torchvision_operators; rft_torchvision_operators.activate()\n"
        )
        print(f"torchvision is a CUDA build beside a CPU torch ({error}): cured in {packages}")
        error = _import_error("torchvision")
    if error:
        raise SystemExit(f"torchvision does not import, for a reason that is not known here: {error}")
    for module in ("torchaudio", "torchcodec"):
        if importlib.util.find_spec(module) and (error := _import_error(module)):
            print(f"{module} does not import beside this torch ({error}): uninstalled, it is not needed")
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", module], check=True)


if __name__ == "__main__":
    repair()
