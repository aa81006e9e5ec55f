"""W&B (https://wandb.ai): curves, confusion matrices and pictures of groups. It sends them to a server.

`WANDB_MODE=offline` keeps everything in `runs/NAME/wandb/` until `wandb sync` sends it.
"""

import io
import os
from collections.abc import Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object, write_json
from rft_cluster.config import Config
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.tracker import Tracker
from rft_cluster.tracking.figures import Shown, evaluation_curves, step_curves

PROJECT = "rft_cluster"  # unless WANDB_PROJECT says otherwise
FOLDER, ID_FILE = "wandb", "rft_cluster.json"
SERVER = "https://api.wandb.ai"
INIT_SECONDS = 30.0  # within which the server must answer; the end of a process waits for that, too


def check_login() -> None:
    """Raise UserError if W&B would ask for a key: nobody may be there to answer."""
    server = urlsplit(os.environ.get("WANDB_BASE_URL", SERVER)).hostname or ""
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    keys = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not (offline or keys or _in_netrc(server)):
        raise UserError(
            f"tracking: W&B has no key for {server} here: run `wandb login`, or set WANDB_API_KEY; or set "
            f"WANDB_MODE=offline to send the run later (wandb sync); or leave it out: tracking=[tensorboard]"
        )


def _in_netrc(server: str) -> bool:
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc(str(file)).authenticators(server) is not None
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False


class WandB(Tracker):
    """A `Tracker` that logs to a run of W&B. One run of ours is one run of theirs, also when it resumes."""

    def __init__(self, config: Config, shown: Shown) -> None:
        self._config, self._shown = config, shown
        self._run: Any = None

    def begin(self, first_step: int) -> None:
        """W&B has no way back: of the steps that are done again, those that it has are not sent again."""
        if self._run is not None:
            return
        import wandb

        folder = self._config.run_folder / FOLDER
        folder.mkdir(exist_ok=True)
        known = json_object((folder / ID_FILE).read_bytes()) if (folder / ID_FILE).is_file() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._config.run.name,
            id=str(known["id"]) if known and "id" in known else None,
            resume="allow",
            reinit="create_new",  # the fold before, in this process, may still send its last pictures
            dir=str(self._config.run_folder),
            config=self._config.model_dump(mode="json"),
            # Neither code, nor the list of packages, nor the console's text is sent.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=INIT_SECONDS,
            ),
        )
        write_json(folder / ID_FILE, {"id": self._run.id})
        if not self._run.offline:
            print(f"W&B shows the run at {self._run.url}", flush=True)

    def step(self, stats: StepStats) -> None:
        self._log(stats.step, step_curves(stats))

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        matrix = self._image(self._shown.confusion(evaluation, judged), f"{evaluation.n} images")
        self._log(evaluation.step, {**evaluation_curves(evaluation), f"{evaluation.split}/confusion": matrix})

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pictures = self._shown.pictures(step, rows)
        if pictures:
            captions = [f"{row['label']}, {row['example_id']}" for row in rows]
            self._log(step, {"rollouts": [self._image(*one) for one in zip(pictures, captions, strict=False)]})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def _image(self, png: bytes, caption: str) -> Any:
        import wandb

        return wandb.Image(Image.open(io.BytesIO(png)), caption=caption)
