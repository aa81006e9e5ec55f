"""The table of what was injected, and what it cost: a row a fault, from the rows that the tests wrote."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).parents[2] / "runs" / "faults.jsonl"
HEAD = ("fault", "times", "found after", "next new step after", "ledger", "same bytes")


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
    lines = [HEAD, ("---",) * len(HEAD), *(_line(fault, same) for (_, fault), same in kinds.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(fault: str, rows: Sequence[Row]) -> tuple[str, ...]:
    ledger = "whole" if all(row.ledger for row in rows) else ""
    exact = "yes" if any(row.exact for row in rows) else ""
    found, lost = _seconds(row.found for row in rows), _seconds(row.lost for row in rows)
    return (re.sub(r"\|", "\\|", fault), str(len(rows)), found, lost, ledger, exact)


def _seconds(values: Iterable[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    low, high = f"{known[0]:.1f}", f"{known[-1]:.1f}"
    return f"{low} s" if low == high else f"{low} to {high} s"
