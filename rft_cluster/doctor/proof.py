"""The proof from a run's files, in words; `run/ledger.py` makes it."""

from pathlib import Path

from rft_cluster.common.text import shown
from rft_cluster.run.ledger import Check, Epoch, Ledger, check_run

LINES = 3  # problems shown of a check
ROWS = 10  # of the table of epochs


def prove(run: Path) -> int:
    """Print the proof. Returns the exit code: 0 proved, 1 something is wrong.

    Raises:
        UserError: the folder is no run.
    """
    ledger = check_run(run)
    print("\n".join([*_checks(ledger), "", *_account(ledger), "", _verdict(ledger)]), flush=True)
    return 1 if ledger.problems else 0


def _checks(ledger: Ledger) -> list[str]:
    lines = [f"{shown(str(ledger.folder))}: {ledger.steps} of {ledger.of} steps, {ledger.state}"]
    for check in ledger.checks:
        lines += _check(check)
    return lines


def _check(check: Check) -> list[str]:
    if not check.problems:
        return [f"{check.name:<12}ok     {check.proved}"]
    lines = [f"{check.name if not i else '':<12}WRONG  {problem}" for i, problem in enumerate(check.problems[:LINES])]
    if more := len(check.problems) - LINES:
        lines += [f"{'':<12}       and {more} more"] if more > 0 else []
    return [*lines, f"{'':<12}       {check.cure}"]


def _account(ledger: Ledger) -> list[str]:
    """A table of what became of the prompts, then what else the ledger knows."""
    fates = [fate for fate in ledger.fates if ledger.fates[fate]]
    size = -(-len(ledger.epochs) // ROWS) or 1
    rows = [ledger.epochs[start : start + size] for start in range(0, len(ledger.epochs), size)]
    table = [f"{'epoch':<12}{'prompts':>8}" + "".join(f"{fate:>{len(fate) + 3}}" for fate in fates)]
    table += [_row(_numbers(epochs), epochs, fates) for epochs in rows]
    table += [_row("all", ledger.epochs, fates)] if len(rows) > 1 else []
    masked = [f"masked completions: {number} by {shown(reason)}" for reason, number in ledger.masked.most_common(5)]
    again = f"{len(ledger.redone)} steps redone, {ledger.replayed} of them with the same completions"
    checkpoints = f"checkpoints: {', '.join(map(str, ledger.checkpoints)) or 'none'}"
    return [*(table if ledger.epochs else []), *masked, again, checkpoints]


def _numbers(epochs: tuple[Epoch, ...]) -> str:
    first, last = epochs[0].number, epochs[-1].number
    return str(first) if first == last else f"{first} to {last}"


def _row(name: str, epochs: tuple[Epoch, ...], fates: list[str]) -> str:
    numbers = "".join(f"{sum(epoch.fates.get(fate, 0) for epoch in epochs):>{len(fate) + 3}}" for fate in fates)
    return f"{name:<12}{sum(epoch.prompts for epoch in epochs):>8}{numbers}"


def _verdict(ledger: Ledger) -> str:
    if ledger.problems:
        return f"NOT proved: {len(ledger.problems)} things are wrong"
    return "proved: nothing was lost, and nothing was done twice"
