"""Check a model's folder before anything heavy is imported: no torch here.

config.json                   a known family (`families/`) with a long enough window
model.safetensors             the weights, or several such files with model.safetensors.index.json, which maps tensors
                              to files
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.known import family_of
from rft_cluster.model.numbers import check_against, check_processor, least_weights
from rft_cluster.model.shapes import Shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TRAINABLE = ("F32", "BF16", "F16")
LAYER = re.compile(r"(.*\b(?:layers|blocks))\.(\d+)\.(.+)")
CURE = "copy or download the folder anew"

TensorShapes = dict[str, list[int]]


def check_model_folder(path: str | Path, longest_sequence: int) -> int:
    """Check that a folder has a complete model of a known family, with a long enough window. Returns its number of
    parameters.

    Raises:
        UserError: the message says what the folder is instead, or what is missing or damaged.
    """
    folder = Path(path)
    config = check_model_config(folder, longest_sequence)
    shapes = _shapes(folder)
    family = family_of(config["model_type"], folder)
    _check_complete(folder, family, config, shapes)
    check_against(least_weights(config, family.numbers, folder / "config.json"), shapes, folder / "config.json")
    return sum(math.prod(shape) for shape in shapes.values())


def check_model_config(folder: Path, longest_sequence: int) -> dict[str, Any]:
    """Read config.json and check that the model is trainable, of a known family, with a long enough window.

    Raises:
        UserError: it is not, or the file is missing or damaged.
    """
    config = _read_config(folder)
    family = family_of(config.get("model_type"), folder)
    if config.get("quantization_config") is not None:
        raise UserError(f"model.path: {folder} is quantised, which cannot be trained: take the model it was made from")
    least_weights(config, family.numbers, folder / "config.json")
    for file in (folder / name for name in PROCESSORS if (folder / name).is_file()):
        check_processor(_read_json(file, ""), family.patch, file)
    layers, windowed = _of_text(config, "num_hidden_layers"), _of_text(config, "max_window_layers")
    sliding = _of_text(config, "use_sliding_window") and not (
        isinstance(layers, int) and isinstance(windowed, int) and windowed >= layers
    )
    if sliding or "sliding_attention" in (_of_text(config, "layer_types") or []):
        raise UserError(f"model.path: {folder} has use_sliding_window set, which is not supported")
    window = _of_text(config, "max_position_embeddings")
    if isinstance(window, int):
        check_window(window, longest_sequence, str(folder))
    return config


def read_family(folder: Path) -> Family:
    """The family of a model, by its config.json.

    Raises:
        UserError: there is none, or it is of no known family.
    """
    return family_of(_read_config(folder).get("model_type"), folder)


def read_shapes(folder: Path) -> Shapes:
    """The sizes of a checked model's layers, by its config.json."""
    file = folder / "config.json"
    return Shapes.of(_read_json(file, f"{file} is gone"), file)


def check_window(window: int, longest_sequence: int, model: str) -> None:
    """Raise UserError if a prompt and its completion may not fit into the model's window."""
    if longest_sequence > window:
        raise UserError(
            f"model.max_prompt_tokens + sampling.max_tokens = {longest_sequence} is more than the window of "
            f"{model}, {window} tokens: lower one of them"
        )


def check_parallel(config: dict[str, Any], gpus: int) -> None:
    """Raise UserError if the attention heads cannot be divided over `gpus` GPUs."""
    heads = _of_text(config, "num_attention_heads")
    if isinstance(heads, int) and gpus > 1 and heads % gpus:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"generators.gpus is {gpus}, but the model's {heads} attention heads can only be divided over {fits} GPUs"
        )


def _of_text(config: dict[str, Any], key: str) -> Any:
    """A value of the language model's config. Older configurations have it at the top level."""
    section = config.get("text_config")
    return section.get(key) if isinstance(section, dict) and section else config.get(key)


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json", f"{folder} holds no config.json, so it is not a model folder")


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"model.path: {missing}") from error
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8
        raise UserError(f"model.path: {file} is not JSON: {error}; {CURE}") from error
    if not isinstance(value, dict):
        raise UserError(f"model.path: {file} holds a {type(value).__name__}, not an object; {CURE}")
    return value


def _shapes(folder: Path) -> TensorShapes:
    """The shape of each tensor, from the files' headers. Also checks that each file is as long as its header says."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.path: {folder} holds no .safetensors file (pickled weights are not loaded)")
    index = _read_json(folder / INDEX, f"{folder} holds .safetensors files, but neither {WEIGHTS} nor {INDEX}; {CURE}")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"model.path: {folder / INDEX} holds no weight_map; {CURE}")
    files: dict[str, TensorShapes] = {}
    for file in dict.fromkeys(places.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"model.path: {folder / INDEX} names {file!r}, which is no file of this folder; {CURE}")
        if not (folder / file).is_file():
            raise UserError(f"model.path: {folder} lacks {shown(file)}, which {INDEX} names; {CURE}")
        files[file] = _header(folder / file)
    absent = [name for name, file in places.items() if name not in files[file]]
    if absent:
        where = shown(f"{absent[0]} is not in {places[absent[0]]}")
        raise UserError(f"model.path: {folder}: {len(absent)} tensors are not where {INDEX} says ({where}); {CURE}")
    return {name: files[file][name] for name, file in places.items()}


def _header(file: Path) -> TensorShapes:
    shapes: TensorShapes = {}
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                part = tensors.get_slice(name)
                shapes[name] = part.get_shape()
                if part.get_dtype() not in TRAINABLE:
                    raise UserError(
                        f"model.path: {file} holds {shown(name)} as {part.get_dtype()}, which cannot be trained: it "
                        f"takes {', '.join(TRAINABLE)}"
                    )
    except SafetensorError as error:
        raise UserError(f"model.path: {file} is cut or damaged ({error}); {CURE}") from error
    return shapes


def _check_complete(folder: Path, family: Family, config: dict[str, Any], shapes: TensorShapes) -> None:
    """Check that all layers of the configuration are there with the same tensors, and the tensors beside the layers."""
    layers: dict[str, dict[int, dict[str, list[int]]]] = {}  # prefix -> layer number -> name -> shape
    for name, shape in shapes.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = shape
    vision = config.get("vision_config")
    depth = vision.get("depth") if isinstance(vision, dict) else None
    for kind, wanted in (("layers", _of_text(config, "num_hidden_layers")), ("blocks", depth)):
        found = next((numbers for prefix, numbers in layers.items() if prefix.endswith(kind)), {})
        usual = Counter(name for tensors in found.values() for name in tensors)
        missing = [f"{kind}.{n}" for n in range(wanted if isinstance(wanted, int) else len(found)) if n not in found]
        missing += [f"{kind}.{n}.{name}" for n, has in sorted(found.items()) for name in usual if name not in has]
        if missing or not found:
            raise _incomplete(folder, missing or [kind])
    missing = [name for name in family.beside_layers if not any(f".{has}".endswith(f".{name}") for has in shapes)]
    if missing:
        raise _incomplete(folder, missing)
    table = next(shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight"))
    told = [_of_text(config, "vocab_size"), _of_text(config, "hidden_size")]
    if None not in told and table != told:
        raise UserError(
            f"model.path: {folder}: config.json says {told[0]} tokens of width {told[1]}, but the weights have "
            f"{' x '.join(map(str, table))}; {CURE}"
        )


def _incomplete(folder: Path, missing: list[str]) -> UserError:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return UserError(f"model.path: {folder} lacks weights: {', '.join(missing[:3])}{more}; {CURE}")


def check_encoder(folder: Path) -> None:
    """Check in a moment, before a run, that a folder may hold an image encoder.

    Raises:
        UserError: it has no configuration, no processor or no safetensors.
    """
    for needed in ("config.json", "*processor_config.json", "*.safetensors"):
        if not list(folder.glob(needed)):
            raise UserError(
                f"evaluation.encoder: {folder} has no {needed}: name the folder of an image encoder as transformers "
                f"saves it, e.g. of SigLIP2 or DINOv3"
            )
