"""Find a model's files: in a folder, in the hub's cache on this machine, or on the hub.

find_model("models/qwen")                     a folder: returned as it is
find_model("Qwen/Qwen2-VL-2B-Instruct")       complete in the cache: the folder there, without asking the hub
                                              not in the cache: its configuration and tokenizer are fetched (some MB),
                                              enough for all checks; `fetch_weights` fetches the rest later
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rft_cluster.common.errors import Unavailable, UserError, is_passing
from rft_cluster.common.files import check_space, check_writable, size
from rft_cluster.common.lookup import nearest
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.folder import check_model_config, check_model_folder

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KNOWN = [name for family in FAMILIES.values() for name in family.published]
SMALL = ["*.json", "*.txt", "*.jinja"]
UNKNOWN = (401, 404)  # the hub's answers for a missing or a private model
WEIGHTS = ["*.safetensors"]


@dataclass(frozen=True)
class Model:
    """A model's files.

    `folder`: has configuration, tokenizer and processor, and the weights if `missing` is 0.
    `missing`: bytes of weights still to be fetched.
    `note`: a line for the user about the model's origin, unless it is a local folder.
    """

    folder: Path
    missing: int = 0
    note: str = ""


def find_model(path: str) -> Model:
    """The model that `model.path` names.

    Raises:
        Unavailable: the hub cannot be reached. The message says what to do.
        UserError: the path is neither a folder nor a hub name; or the hub denies the model; or its weights would not
            fit on the disk. The message says what to do.
    """
    folder = Path(path)
    if path and folder.is_dir():
        return Model(folder)
    if path and folder.exists():
        raise UserError(f"model.path: {path} is a file; it must be a model's folder, or a name on the hub")
    if not HUB_NAME.fullmatch(path):
        form = "" if "/" in path else " (a model on the hub has a name of the form owner/name)"
        raise UserError(f"model.path: there is no folder {path}{form}. {_nearest(path)}".rstrip())
    if cached := _cached(path):
        return Model(cached, note=f"model       {path}, whole in the local cache ({cached})")
    return _on_the_hub(path)


def check_files(model: Model, longest_sequence: int) -> int:
    """Check the model's files that are here. Returns its number of parameters.

    Raises:
        UserError: as in `check_model_folder`.
    """
    if model.missing:
        check_model_config(model.folder, longest_sequence)
        return model.missing // 2  # published weights are BF16: 2 bytes a parameter
    return check_model_folder(model.folder, longest_sequence)


def whole_model(path: str) -> Path:
    """The model's folder on this host, with all its files; those of a hub model are fetched if necessary.

    Raises:
        UserError: as in `find_model`.
    """
    model = find_model(path)
    return fetch_weights(path) if model.missing else model.folder


def fetch_weights(path: str) -> Path:
    """Fetch all files of a hub model, with a progress bar. Returns the folder in the cache.

    Raises:
        UserError: as in `find_model`.
    """
    from huggingface_hub import snapshot_download

    with _asking(path):
        return Path(snapshot_download(path, allow_patterns=[*SMALL, *WEIGHTS]))


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL, *WEIGHTS], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if list(folder.glob("*.safetensors")) else None


def _on_the_hub(name: str) -> Model:
    from huggingface_hub import HfApi, constants, snapshot_download

    with _asking(name):
        info = HfApi().model_info(name, files_metadata=True, timeout=10)
    sizes = [file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
    missing, cache = sum(sizes), Path(constants.HF_HUB_CACHE)
    cure = "Set HF_HOME to another folder"
    check_writable(cache, cure)
    check_space(cache, missing, f"model.path: the weights of {name}", f"Free some. {cure}")
    with _asking(name):
        folder = Path(snapshot_download(name, allow_patterns=SMALL))
    note = f"model       {name}, not in the local cache: {size(missing)} will be downloaded to {cache}"
    return Model(folder, missing, note)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Translate the hub's errors within this context.

    Raises:
        Unavailable: the hub cannot be reached, or is too busy.
        UserError: it has no such model for this user, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"model.path: {name} is only for those whom its owner lets in: ask for it on the model's page, then log in "
            f"here with: hf auth login"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code not in UNKNOWN:
            refused = f"model.path: the hub refuses {name}: {_first_line(error)}. Try again later"
            raise (Unavailable if is_passing(error.response.status_code) else UserError)(refused) from error
        raise UserError(
            f"model.path: {name} is no folder here, and the hub has no such model or does not show it to you. "
            f"{_nearest(name)}For a private one log in with: hf auth login"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else _first_line(error)
        raise (UserError if offline else Unavailable)(
            f"model.path: {name} is no folder here and not in the local cache, and the hub cannot be reached ({why}). "
            f"{_nearest(name)}Where it can be, run:\n"
            f"  hf download {name} --local-dir {name.rpartition('/')[2]}\n"
            f"Bring that folder here and set model.path to it"
        ) from error


def _nearest(path: str) -> str:
    """A hint: a folder or a known model with a similar name."""
    parent = Path(path).parent
    known = {str(parent / file.parent.name): str(parent / file.parent.name) for file in parent.glob("*/config.json")}
    if not path.startswith((".", "~", "/")):
        known |= {name if "/" in path else name.rpartition("/")[2]: name for name in KNOWN}
    by_case = {name.lower(): meant for name, meant in known.items()}
    near = nearest(str(Path(path)).lower(), by_case)
    return f"Did you mean {by_case[near]}? " if near and by_case[near] != path else ""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
