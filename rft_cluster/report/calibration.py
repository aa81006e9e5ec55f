"""The probabilities of the exported policy, for the page: the reliability diagram, and accuracy by coverage."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rft_cluster.common.errors import UserError
from rft_cluster.common.files import json_object
from rft_cluster.run.saving import CALIBRATION_FILE, MODEL, exported

Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]
MOST = 1000  # bins, and points of the curve
TESTED = "evaluation-test/evaluation.json"
MOST_BYTES = 200_000_000


class _Checked(BaseModel):
    """Of files that a stranger may have written: what is not used is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Figure(_Checked):
    value: float
    interval: Interval


class Rate(_Checked):
    rate: Share
    n: int = Field(ge=1)
    interval: Interval


class Bin(Rate):
    confidence: Share


class Coverage(Figure):
    accuracy: Share
    threshold: Share | None


class Curve(_Checked):
    coverage: list[Share] = Field(max_length=MOST)
    accuracy: list[Share] = Field(max_length=MOST)


class Figures(_Checked):
    """`classification.calibration.calibration_figures`."""

    accuracy: Rate
    top5: Rate | None = None  # none with 5 classes or fewer
    log_loss: Figure
    calibration_error: Figure
    coverage: Coverage
    reliability: list[Bin] = Field(max_length=MOST)
    curve: Curve


class _Short(_Checked):
    log_loss: Figure
    calibration_error: Figure


class _Evaluated(Figures):
    temperature: float | None
    unfitted: _Short | None = None


class _Fitted(_Checked):
    temperature: float
    unfitted: _Short
    fitted: Figures


def probabilities_of(run: Path, problems: list[str]) -> dict[str, Any] | None:
    """What the page shows of the last policy's probabilities: those of `evaluate` on the test images, else those of the
    validation images at the end of the run; None without either. What is damaged is added to `problems`."""
    evaluated, fitted = (_object(run / name, problems) for name in (TESTED, CALIBRATION_FILE))
    try:
        if "probabilities" in evaluated and _is_of_the_last(run, evaluated):
            test = _Evaluated.model_validate(evaluated["probabilities"])
            return _shown("test", test, test.unfitted, test.temperature)
        if MODEL in fitted.get("models", {}):
            own = _Fitted.model_validate(fitted["models"][MODEL])
            return _shown("validation, on which the temperature was fitted", own.fitted, own.unfitted, own.temperature)
    except (ValidationError, TypeError) as error:
        problems.append(f"{TESTED} or {CALIBRATION_FILE} is damaged: {str(error).splitlines()[0]}")
    return None


def _is_of_the_last(run: Path, evaluated: dict[str, Any]) -> bool:
    """False if a policy was evaluated that has been trained on since. Files of earlier versions do not say."""
    try:
        last = exported(run / MODEL)
    except UserError:  # the page says elsewhere that it is damaged
        return True
    return last is None or evaluated.get("steps", last.steps) == last.steps


def why_not_calibrated(run: Path) -> str:
    """What kept a temperature from being fitted, as recorded; empty otherwise."""
    return str(_object(run / CALIBRATION_FILE, []).get("skipped", ""))


def _shown(split: str, figures: Figures, unfitted: _Short | None, temperature: float | None) -> dict[str, Any]:
    curve = figures.curve
    return {
        "split": split,
        "temperature": temperature,
        "figures": figures,
        "unfitted": None if temperature is None else unfitted,
        "points": [(100 * x, 100 * y) for x, y in zip(curve.coverage, curve.accuracy, strict=False)],
        "least": 100 * min([0.9, *curve.accuracy]),  # where the axis of the curve begins
    }


def _object(file: Path, problems: list[str]) -> dict[str, Any]:
    if not file.is_file() or file.parent.is_symlink() or file.is_symlink() or file.stat().st_size > MOST_BYTES:
        return {}
    found = json_object(file.read_bytes())
    if found is None:
        problems.append(f"{file.name} is damaged, no JSON object")
    return found or {}
