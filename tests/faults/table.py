"""The table of what was injected, and what it cost: a row a fault, from the rows that the tests wrote."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).parents[2] / "runs" / "faults.jsonl"
HEAD = ("fault", "what happens", "times", "found after", "next new step after", "ledger", "same bytes")
OTHERS = "it is replaced"
LEARNERS = "all learners start afresh"
HAPPENS = {
    1: OTHERS,
    2: OTHERS,
    3: OTHERS,
    4: "it is ended after `cluster.step_timeout`, and replaced",
    5: "after `cluster.restarts` the run ends with exit code 3 and the command to resume",
    6: "refused by its digest, and sent again",
    7: LEARNERS,
    8: LEARNERS,
    9: "it is ended after `cluster.step_timeout`; all learners start afresh",
    10: "a fresh one scores the rest",
    11: "its completion is masked",
    12: "what was on it starts on other nodes, or the run goes on with fewer generators",
    13: "`--resume` goes on, from the newest checkpoint and the journal",
    14: "a run that goes on finds a whole checkpoint, and the journal since",
    15: "a warning; the one before is taken, and the journal has the steps since",
    16: "a warning, or one line and exit code 2, after which `--resume` goes on; nothing half-written is left",
    17: "the step in flight is finished and saved; 130 or 143, and `--resume` goes on",
    18: "the run goes on; a resume names both until they are back",
    19: "the update is left out on all learners, or its weights are not finite; the run ends with exit code 2, and "
    "nothing is exported",
    20: "the run goes on; who was ended is replaced",
    21: "refused before Ray starts",
    22: "one is refused, and the other not disturbed",
    23: "it gets the weights and then prompts; without it the others go on",
    24: "the run goes on; a second run with its journal ends with the same bytes",
    25: "other learners go on from the newest checkpoint and the journal",
}
"""What happens after a fault, by its number."""


@dataclass(frozen=True)
class Row:
    """One injected fault that a run has survived, or refused as it should."""

    number: int
    """Faults of one number are of one kind."""
    fault: str
    phase: str = ""
    found: float | None = None
    """Seconds from the fault to the first word of it."""
    lost: float | None = None
    """Seconds from the fault to the next step that was not there before."""
    ledger: bool = False
    """True if the run's records were checked and have every prompt once."""
    exact: bool | None = None
    """True if the run ended with the same bytes as without the fault; None if they need not be equal."""

    def write(self) -> None:
        print(self)
        FILE.parent.mkdir(exist_ok=True)
        with FILE.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read(file: Path = FILE) -> list[Row]:
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []


def markdown(rows: Iterable[Row]) -> str:
    """A line a fault, in the order of their numbers."""
    kinds: dict[tuple[int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.number, row.fault)):
        kinds.setdefault((row.number, row.fault), []).append(row)
    lines = [HEAD, ("---",) * len(HEAD), *(_line(*kind, same) for kind, same in kinds.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(number: int, fault: str, rows: Sequence[Row]) -> tuple[str, ...]:
    ledger = "whole" if all(row.ledger for row in rows) else ""
    exact = "yes" if any(row.exact for row in rows) else ""
    found, lost = _seconds(row.found for row in rows), _seconds(row.lost for row in rows)
    return (fault, HAPPENS[number], str(len(rows)), found, lost, ledger, exact)


def _seconds(values: Iterable[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    low, high = f"{known[0]:.1f}", f"{known[-1]:.1f}"
    return f"{low} s" if low == high else f"{low} to {high} s"
