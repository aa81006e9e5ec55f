"""Classify images: python -m rft_cluster.predict --checkpoint RUN_OR_MODEL IMAGE_OR_FOLDER... [--json | --csv]

The exported model contains its classes, question and pixel limits. Answers are greedy, like those that accuracy is
measured on. With --votes several samples an image vote, and the share of votes shows how certain the policy is.
Exit code 1: some files could not be read.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from rft_cluster.classification.answers import AnswerReader, Vote
from rft_cluster.classification.card import Card, find_export, read_card
from rft_cluster.common.errors import UserError, check_range, exit_code
from rft_cluster.common.hardware import hardware, openmp_environment
from rft_cluster.common.lookup import near_path
from rft_cluster.common.text import csv_line, printable
from rft_cluster.config import GeneratorsSection, ModelSection
from rft_cluster.config.bounds import MOST_GIB
from rft_cluster.data.files import SUFFIXES, LeftOut, is_system
from rft_cluster.data.images import Limits, check_image, image_sha256
from rft_cluster.data.shown import View, fitted, shown_bytes
from rft_cluster.messages import Example, ImageRef, Images, Sampling
from rft_cluster.model.folder import check_model_folder, read_family
from rft_cluster.model.image_size import view_of
from rft_cluster.prompts import make_prompts

if TYPE_CHECKING:
    from rft_cluster.generator.generator import Generator

AT_ONCE = 32  # images in the engine at a time, so that results stream and memory is bounded
REASONING_SHOWN = 200
COLUMNS = ("file", "label", "share", "reasoning")  # of --csv
COUNTED = 20  # classes listed in the summary
NO_CLASS = "(no class)"
UNKNOWN = "(unknown)"  # the label of an image that is to be classified


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 some files could not be read, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run's folder, or a model it exported")
    parser.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object a line, for programs")
    form.add_argument("--csv", action="store_true", help="a table, for spreadsheets: file, label, share, reasoning")
    parser.add_argument("--votes", type=int, default=1, help="samples an image for a vote; 1: one greedy answer (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (0)")
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="CPU only: memory of the KV cache, in GiB (1)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: predict(options))


def predict(options: argparse.Namespace) -> int:
    """Classify every image under the given paths, and print each result as soon as it is there."""
    check_range("--votes", options.votes, 1, 10_000)
    check_range("--seed", options.seed, 0, 2**32 - 1)
    check_range("--kv-cache-gib", options.kv_cache_gib, 1, MOST_GIB)
    export = find_export(options.checkpoint)
    card = read_card(export)
    check_model_folder(export, card.max_prompt_tokens + card.max_tokens)
    left_out = LeftOut()
    files = list(image_files(options.paths, left_out))
    notes = left_out.notes()
    if not files:
        raise UserError(
            "; ".join([f"no image files ({' '.join(SUFFIXES)}) in {', '.join(map(str, options.paths))}", *notes])
        )
    for note in notes:
        print(note, file=sys.stderr)
    reader = AnswerReader(card.classes, card.aliases)
    unreadable: list[str] = []
    labels: Counter[str] = Counter()
    if options.csv:
        print(csv_line(COLUMNS), end="")
    with tqdm(total=len(files), unit="image", disable=len(files) < AT_ONCE) as bar:
        for path, vote in _answers(export, card, files, options, reader, unreadable):
            with bar.external_write_mode(file=sys.stdout):
                print(_line(path, vote, options), flush=True)
            labels[NO_CLASS if vote.label is None else printable(vote.label)] += 1
            bar.update()
        bar.update(len(unreadable))
    for problem in unreadable:
        print(f"not classified: {printable(problem)}", file=sys.stderr)
    if len(files) > 1:
        print(_summary(labels, len(unreadable)), file=sys.stderr)
    return 1 if unreadable else 0


def _summary(labels: Mapping[str, int], unreadable: int) -> str:
    """`81 images: 41 bag, 38 shoe, 2 (no class)`, most frequent first, then the number of unreadable files."""
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{count} {label}" for label, count in ranked[:COUNTED]]
    rest = ranked[COUNTED:]
    if rest:
        counts.append(f"{sum(count for _, count in rest)} of {len(rest)} other classes")
    failed = [f"{unreadable} not classified"] if unreadable else []
    total = sum(labels.values())
    return "; ".join([f"{total} images: {', '.join(counts)}" if total else "0 images", *failed])


def image_files(paths: list[Path], left_out: LeftOut) -> Iterator[Path]:
    """The given files, and all images in and below the given folders, sorted.

    Hidden files and system folders are left out. `left_out` counts other files in the folders.

    Raises:
        UserError: a path does not exist.
    """
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                below = [Path(folder, name) for name in sorted(folders)]
                for system in filter(is_system, below):
                    left_out.system(system)
                for link in (one for one in below if one.is_symlink()):  # not followed: links may form a cycle
                    left_out.beside(link, "links to folders")
                folders[:] = [one.name for one in below if not (is_system(one) or one.name.startswith("."))]
                for file in (Path(folder, name) for name in sorted(names)):
                    if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                        yield file
                    else:
                        left_out.file(file)
        elif path.exists():
            yield path
        else:
            raise UserError(f"there is no file or folder {path}{near_path(path)}")


def _answers(
    export: Path, card: Card, files: list[Path], options: argparse.Namespace, reader: AnswerReader, bad: list[str]
) -> Iterator[tuple[Path, Vote]]:
    """Yield each readable file with its vote, in order. Messages about unreadable files are appended to `bad`."""
    engine = None
    images: dict[str, bytes] = {}  # those that are in the engine
    limits = Limits(card.data_max_pixels, card.data_max_bytes, keys=False)
    side = read_family(export).side
    readable = _readable(files, bad, limits, card.levels, view_of(card.min_pixels, card.max_pixels, side))
    while chunk := list(islice(readable, AT_ONCE)):
        if engine is None:  # start the engine only when there is an image to classify
            print(f"loading the model and starting its engine for {len(files)} images ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            engine = _start(export, card, options, images)
            print(f"ready after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        generator, sampling = engine
        images.clear()
        images.update({reference.sha256: image for _, reference, image in chunk})
        examples = [Example(reference, label=UNKNOWN) for _, reference, _ in chunk]
        prompts = make_prompts(examples, card.prompt, "predict", 0, options.seed)
        for (path, _, _), group in zip(chunk, generator.generate(prompts, sampling, version=0), strict=True):
            yield path, reader.vote([completion.text for completion in group.completions])


def _readable(
    files: list[Path], bad: list[str], limits: Limits, levels: tuple[int, int] | None, view: View
) -> Iterator[tuple[Path, ImageRef, bytes]]:
    """Yield each readable image, converted as in training. Messages about unreadable files are appended to `bad`."""
    for path in files:
        try:
            if not path.is_file():  # opening a named pipe would block for ever
                raise UserError(f"{path}: not a file")
            with path.open("rb") as file:
                image = file.read(limits.bytes + 1)  # one more than `check_image` accepts
            check_image(image, str(path), limits)
            reference = ImageRef(str(path), image_sha256(image))
            image = fitted(shown_bytes(image, levels, limits.pixels), view)
        except OSError as error:
            bad.append(f"{path}: {error.strerror or error}")
        except UserError as error:
            bad.append(str(error))
        else:
            yield path, reference, image


def _start(export: Path, card: Card, options: argparse.Namespace, images: Images) -> "tuple[Generator, Sampling]":
    """Start an engine in this process, for prompts of these images. Returns it with the sampling parameters."""
    from rft_cluster.generator.generator import Generator
    from rft_cluster.generator.vllm_options import EngineOptions, device_here

    # stdout gets results only; stderr gets messages about files, and of vLLM's output only errors.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    device = device_here()
    generator = Generator(
        EngineOptions(
            str(export),
            ModelSection(path=str(export), min_pixels=card.min_pixels, max_pixels=card.max_pixels),
            GeneratorsSection(gpus=1 if device == "cuda" else 0, kv_cache_gib=options.kv_cache_gib),
            max_tokens=card.max_prompt_tokens + card.max_tokens,
            hardware=hardware(device),
            seed=options.seed,
        ),
        images,
    )
    generator.serve_checkpoint(0)
    return generator, Sampling(options.votes, card.temperature if options.votes > 1 else 0.0, card.max_tokens)


def _line(path: Path, vote: Vote, options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps({"file": str(path), **asdict(vote)}, ensure_ascii=False)
    if options.csv:
        return csv_line([str(path), vote.label or "", round(vote.share, 4), printable(vote.reasoning)]).rstrip("\n")
    label = printable(vote.label) if vote.label is not None else NO_CLASS
    shown = printable(vote.reasoning)[:REASONING_SHOWN]
    how = f"{100 * vote.share:.0f} %" if options.votes > 1 else "greedy"
    return f"{printable(str(path))}\t{label}\t{how}\t{shown}"


def _begin_again_with_openmp() -> None:
    """Restart the process with Intel's OpenMP runtime, which must be loaded before anything else."""
    environment = openmp_environment("cpu")
    if environment and "LD_PRELOAD" not in os.environ:
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # torch would warn on every start where its memory lies
        os.execve(
            sys.executable, [sys.executable, "-m", "rft_cluster.predict", *sys.argv[1:]], os.environ | environment
        )


if __name__ == "__main__":
    _begin_again_with_openmp()
    sys.exit(main())
