"""Classify images: python -m rft_cluster.predict --checkpoint RUN_OR_MODEL IMAGE_OR_FOLDER... [--json | --csv]

The exported model contains its classes, question and pixel limits. A question that lists the classes and asks for the
answer alone needs no engine: the probabilities of all classes are computed, and the most probable is the answer. Any
other question is answered in writing, greedily, like those that accuracy is measured on; --closed answers the most
probable class, given the reasoning if there is one, and --unsure-below 0.8 answers "unsure" below that probability.
With --votes several written samples an image vote. --second-look 5 asks again, with the policy's own five most probable
answers as the only options. Exit code 1: some files could not be read.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.card import Card, find_export, read_card
from rft_cluster.classification.predictions import (
    COLUMNS,
    COLUMNS_OF_P,
    Prediction,
    json_line,
    summary_line,
    table_line,
    text_line,
)
from rft_cluster.classification.probabilities import OPEN, Score, answer_of, before_answer, score_classes
from rft_cluster.classification.second_look import Again, looked_again
from rft_cluster.cluster.gpus import check_driver, driver_here
from rft_cluster.common.errors import UserError, check_range, end_with, exit_code
from rft_cluster.common.files import walk
from rft_cluster.common.hardware import hardware, openmp_environment
from rft_cluster.common.lookup import near_path
from rft_cluster.common.text import csv_line, printable
from rft_cluster.config import GeneratorsSection, ModelSection
from rft_cluster.config.bounds import MOST_GIB
from rft_cluster.data.files import SUFFIXES, LeftOut, is_system
from rft_cluster.data.images import Limits, check_image, image_sha256
from rft_cluster.data.shown import View, fitted, shown_bytes
from rft_cluster.messages import Example, Group, ImageRef, Sampling
from rft_cluster.model.folder import check_model_folder, read_family
from rft_cluster.model.image_size import view_of
from rft_cluster.prompts import asks_for_thinking, longest, make_prompts, narrowed
from rft_cluster.run.probabilities import score_again
from rft_cluster.run.second_look import Ask, options_at_second_look, written_again

AT_ONCE = 32  # images in the engine at a time, so that results stream and memory is bounded
UNKNOWN = "(unknown)"  # the label of an image that is to be classified
# Of a GPU's memory for the engine, at most: alone, and if the policy is also loaded to compute probabilities.
ENGINE_ALONE, ENGINE_SHARING = 0.85, 0.6
SPARE, SPARE_FOR_SCORER = 0.02, 3 * 2**30  # left of what is free: of all memory, and bytes for a row of all classes

VOTES = 8  # samples whose answers are the options of a second look, unless --votes is given

Readable = tuple[Path, ImageRef, bytes]  # an image as the model sees it
Write = Callable[[Sequence[Readable]], list[tuple[Group, Again | None]]]


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 some files could not be read, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run's folder, or a model it exported")
    parser.add_argument("paths", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object a line, for programs")
    form.add_argument("--csv", action="store_true", help="a table, for spreadsheets")
    parser.add_argument("--closed", action="store_true", help="answer the most probable class, with its probability")
    parser.add_argument("--unsure-below", type=float, metavar="P", help='closed, and "unsure" below this probability')
    parser.add_argument("--votes", type=int, help="written samples an image, for a vote; 1: one greedy answer")
    parser.add_argument(
        "--second-look", type=int, default=0, metavar="K", help="ask again with the policy's K most probable answers"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (0)")
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="CPU only: memory of the KV cache, in GiB (1)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: predict(options))


@dataclass(frozen=True)
class Way:
    """How images are answered: whether the policy `writes` an answer, whether classes get `probabilities`, and how many
    `options` a second look has (0: there is none)."""

    writes: bool
    probabilities: bool
    options: int = 0


def way_of(options: argparse.Namespace, card: Card) -> Way:
    """A question without reasoning needs no written answer to make the classes' probabilities, and gets them unasked if
    it lists the classes: no other answer was ever right.

    Raises:
        UserError: votes are asked for, which have no use there; or a second look, which is written after reasoning, and
            probabilities of it.
    """
    thinks, closed = asks_for_thinking(card.prompt), options.closed or options.unsure_below is not None
    looks = options_at_second_look(options.second_look, card.question, card.classes)
    if looks and closed and thinks:
        raise UserError(
            "after reasoning, the answer of --second-look is in writing and has no probability: leave that out, or "
            "--closed and --unsure-below"
        )
    if looks and thinks and options.votes == 1:
        raise UserError(
            f"--votes is 1, so there is one answer and nothing to ask again about: give it 2 or more, or leave it out "
            f"({VOTES})"
        )
    closed = closed or bool(looks and not thinks)
    if closed and not thinks and options.votes is not None:
        raise UserError(
            f"--votes is {options.votes}, but this policy writes no reasoning, so a class has the same probability in "
            f"every sample: leave out --votes, or --closed, --unsure-below and --second-look"
        )
    probabilities = closed or (card.template is not None and not thinks and options.votes is None)
    return Way(thinks or not probabilities, probabilities, looks)


def predict(options: argparse.Namespace) -> int:
    """Classify every image under the given paths, and print each result as soon as it is there."""
    check_range("--votes", 1 if options.votes is None else options.votes, 1, 10_000)
    check_range("--second-look", options.second_look, 0, 1000)
    check_range("--unsure-below", options.unsure_below or 0, 0, 1)
    check_range("--seed", options.seed, 0, 2**32 - 1)
    check_range("--kv-cache-gib", options.kv_cache_gib, 1, MOST_GIB)
    export = find_export(options.checkpoint)
    card = read_card(export)
    way = way_of(options, card)
    check_model_folder(export, card.max_prompt_tokens + card.max_tokens)
    left_out = LeftOut()
    files = list(image_files(options.paths, left_out))
    notes = left_out.notes()
    if not files:
        raise UserError(
            "; ".join([f"no image files ({' '.join(SUFFIXES)}) in {', '.join(map(str, options.paths))}", *notes])
        )
    if options.second_look and not way.options:
        notes.append(f"no second look: the question already lists all {len(card.classes)} classes")
    for note in notes:
        print(note, file=sys.stderr)
    unreadable: list[str] = []
    labels: Counter[str] = Counter()
    if options.csv:
        print(csv_line(COLUMNS_OF_P if way.probabilities else COLUMNS), end="")
    line = json_line if options.json else table_line if options.csv else text_line
    with tqdm(total=len(files), unit="image", disable=len(files) < AT_ONCE) as bar:
        for one in _predictions(export, card, files, options, way, unreadable):
            with bar.external_write_mode(file=sys.stdout):
                print(line(one), flush=True)
            labels[one.label] += 1
            bar.update()
        bar.update(len(unreadable))
    for problem in unreadable:
        print(f"not classified: {printable(problem)}", file=sys.stderr)
    if len(files) > 1:
        print(summary_line(labels, len(unreadable)), file=sys.stderr)
    return 1 if unreadable else 0


def image_files(paths: list[Path], left_out: LeftOut) -> Iterator[Path]:
    """The given files, and all images in and below the given folders, sorted.

    Hidden files and system folders are left out. `left_out` counts other files in the folders.

    Raises:
        UserError: a path does not exist.
    """
    for path in paths:
        if path.is_dir():
            for folder, folders, names in walk(path):
                below = [folder / name for name in sorted(folders)]
                for system in filter(is_system, below):
                    left_out.system(system)
                for link in (one for one in below if one.is_symlink()):  # not followed: links may form a cycle
                    left_out.beside(link, "links to folders")
                folders[:] = [one.name for one in below if not (is_system(one) or one.name.startswith("."))]
                for file in (folder / name for name in sorted(names)):
                    if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                        yield file
                    else:
                        left_out.file(file)
        elif path.exists():
            yield path
        else:
            raise UserError(f"there is no file or folder {path}{near_path(path)}")


def _predictions(
    export: Path, card: Card, files: list[Path], options: argparse.Namespace, way: Way, bad: list[str]
) -> Iterator[Prediction]:
    """Yield what is said of each readable file, in order. Messages about unreadable files are appended to `bad`."""
    loaded = None
    limits = Limits(card.data_max_pixels, card.data_max_bytes, keys=False)
    side = read_family(export).side
    readable = _readable(files, bad, limits, card.levels, view_of(card.min_pixels, card.max_pixels, side))
    while chunk := list(islice(readable, AT_ONCE)):
        if loaded is None:  # only when there is an image to classify
            loaded = _load(export, card, options, way, len(files))
        write, score = loaded
        written = write(chunk) if write else [(None, None)] * len(chunk)
        for (path, _, image), (group, again) in zip(chunk, written, strict=True):
            one = _prediction(card, options, path, image, group, score, way.options)
            yield replace(one, again=again) if again else one


def _prediction(
    card: Card,
    options: argparse.Namespace,
    path: Path,
    image: bytes,
    group: Group | None,
    score: Score | None,
    looks: int = 0,
) -> Prediction:
    texts = [completion.text for completion in group.completions] if group else []
    vote = AnswerReader(card.classes, card.aliases).vote(texts) if group else None
    if score is None:
        return Prediction(str(path), vote, votes=options.votes)
    befores = [before_answer(text) for text in texts] if group else [OPEN]
    scores = score_classes(score, image, card.prompt, befores, card.classes, card.aliases)
    temperature, again = card.calibration.temperature if card.calibration else 1.0, None
    answer, calibrated = answer_of(scores, card.classes, temperature), card.calibration is not None
    if looks and group is None:  # no temperature is fitted for it
        ask, calibrated = _asked_again(card), False
        again = score_again(score, image, ask, card.classes, card.aliases, scores, looks)
        answer = looked_again(answer, again, temperature)
    return Prediction(str(path), vote, answer, options.votes, options.unsure_below or 0.0, calibrated, again)


def _asked_again(card: Card) -> Ask:
    return partial(narrowed, card.question, card.subject)


def _readable(
    files: list[Path], bad: list[str], limits: Limits, levels: tuple[int, int] | None, view: View
) -> Iterator[Readable]:
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


def _load(
    export: Path, card: Card, options: argparse.Namespace, way: Way, images: int
) -> tuple[Write | None, Score | None]:
    """Load what the way needs: a function that writes answers, and one that scores the classes."""
    print(f"loading the model{' and starting its engine' * way.writes} for {images} images ...", file=sys.stderr)
    started = time.monotonic()
    score = _scorer(export, card) if way.probabilities else None
    write = _writer(export, card, options, way) if way.writes else None
    print(f"ready after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if way.probabilities:
        answers = f"{options.votes} answers" if (options.votes or 1) > 1 else "its greedy answer"
        given = f", given the reasoning in {answers}" if way.writes else ""
        note = "not calibrated, after a second look" if way.options else card.calibration_note
        if (options.votes or 1) > 1 and card.calibration:
            note += ", after one reasoning each, not a mean over several"
        print(f"probabilities{given}: {note}", file=sys.stderr, flush=True)
    return write, score


def _model(export: Path, card: Card) -> ModelSection:
    return ModelSection(path=str(export), min_pixels=card.min_pixels, max_pixels=card.max_pixels)


def _device(engine: bool) -> str:
    """`"cuda"` on a machine with a GPU, else `"cpu"`. torch takes a GPU whose driver is too old for none.

    Raises:
        UserError: the packages are those for GPUs, and the newest GPU here, or its driver, is too old for them; or
            there is none, and an `engine` is wanted, which these packages have for GPUs alone.
    """
    from rft_cluster.model import computing

    if computing.is_built_for_gpus() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        driver = driver_here()
        if driver or engine:
            newest = sorted(driver.gpus, key=lambda gpu: gpu.capability)[-1:] if driver else []
            check_driver("this machine", driver and replace(driver, gpus=newest))
    device = computing.device_here()
    if engine and device == "cpu" and computing.is_built_for_gpus():
        raise UserError(
            "this policy's answers need an engine, and the installed packages have one for GPUs alone, of which torch "
            "finds none here (CUDA_VISIBLE_DEVICES?): use a machine with one, or install the extra cpu"
        )
    return device


def _share_of_gpu(probabilities: bool) -> float:
    """The part of the GPU's memory that an engine gets; other processes, and this one's scorer, may have some of it."""
    from rft_cluster.model import computing

    with computing.within_memory("the GPU"):
        free, total = computing.free_memory()
    spare = SPARE_FOR_SCORER if probabilities else SPARE * total
    return max(SPARE, min(ENGINE_SHARING if probabilities else ENGINE_ALONE, round((free - spare) / total, 3)))


def _scorer(export: Path, card: Card) -> Score:
    """Load the policy in this process."""
    from rft_cluster.model.class_logprobs import ClassScorer

    scorer = ClassScorer(_model(export, card), _device(engine=False))
    scorer.load(str(export))
    return scorer.logprobs


def _writer(export: Path, card: Card, options: argparse.Namespace, way: Way) -> Write:
    """Start an engine in this process."""
    from rft_cluster.generator.generator import Generator
    from rft_cluster.generator.vllm_options import EngineOptions

    # stdout gets results only; stderr gets messages about files, and of vLLM's output only errors.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    device, images = _device(engine=True), dict[str, bytes]()  # those that are in the engine
    engine = {"gpus": 1, "gpu_memory": _share_of_gpu(way.probabilities)} if device == "cuda" else {}
    ask = _asked_again(card)
    room = len(ask(longest(card.classes, way.options)).encode()) if way.options else 0  # a token has a byte or more
    generator = Generator(
        EngineOptions(
            str(export),
            _model(export, card),
            GeneratorsSection(kv_cache_gib=options.kv_cache_gib, **engine),
            max_tokens=card.max_prompt_tokens + room + card.max_tokens,
            hardware=hardware(device),
            seed=options.seed,
        ),
        images,
    )
    generator.serve_checkpoint(0)
    greedy, votes = Sampling(1, 0.0, card.max_tokens), options.votes or (VOTES if way.options else 1)
    sampling = Sampling(votes, card.temperature, card.max_tokens, card.top_k) if votes > 1 else greedy

    def write(chunk: Sequence[Readable]) -> list[tuple[Group, Again | None]]:
        images.clear()
        images.update({reference.sha256: image for _, reference, image in chunk})
        examples = [Example(reference, label=UNKNOWN) for _, reference, _ in chunk]
        prompts = make_prompts(examples, card.prompt, "predict", 0, options.seed)
        groups = generator.generate(prompts, sampling, version=0)
        if not way.options:
            return [(group, None) for group in groups]
        generate = partial(generator.generate, sampling=greedy, version=0)
        reader = AnswerReader(card.classes, card.aliases)
        again = written_again(generate(prompts), groups, reader, card.classes, way.options, ask, generate)
        return list(zip(groups, again, strict=True))

    return write


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
    end_with(main)
