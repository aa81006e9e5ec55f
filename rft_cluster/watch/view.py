"""One view of a run: what the terminal shows at a time. Laid out by rich for any size."""

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import fmean

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rft_cluster.common.text import printable, shown
from rft_cluster.report.hints import Hint
from rft_cluster.run.activity import Now
from rft_cluster.run.figures import finite
from rft_cluster.run.history import History
from rft_cluster.run.metrics import RECENT, clock
from rft_cluster.watch.answers import answer_table, newest
from rft_cluster.watch.curves import Curve

WIDE = 70  # columns from which phases and actors stand side by side
CURVE_WIDTH = 38  # columns of a curve at least, if there are several
CURVE_LINES = (9, 16)  # of a curve, with its border, at least and at most
LEAST = 5  # lines of the answers
PHASES = 4
QUIET = 30.0  # seconds without a word from the driver after which it is said; it writes every second
MOST_ACTORS, MOST_HINTS = 16, 4
FRAME = 2  # lines of a panel's border


class View:
    """A run as it is now."""

    def __init__(self, history: History, now: Now | None, time: float, hints: Sequence[Hint] = ()) -> None:
        """`now`: what the driver says that it is doing. `time`: seconds since 1970, by the clock of this machine."""
        self._history, self._now, self._hints = history, now, hints[:MOST_HINTS]
        self._silent = time - now.now if now else None
        self._phase_seconds = max(0.0, time - now.since) if now else 0.0

    @property
    def goes_on(self) -> bool:
        """True while a process runs it. A file system without locks does not tell; then the driver's word does."""
        return self._history.state == "in progress" or (self._silent is not None and self._silent < QUIET)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._layout(options.max_width, options.height or console.height), options)

    def _layout(self, width: int, height: int) -> Layout:
        """Head, curves, phases and actors, answers, hints; what finds no room is left out, the answers first."""
        head, side = FRAME + len(self._head()), self._side_lines
        room = height - head - side
        fewest, most = CURVE_LINES
        curves = min(most, max(fewest, room // 2)) if room >= fewest else 0
        hints = FRAME + len(self._hints) if self._hints and room - curves >= FRAME + len(self._hints) + LEAST else 0
        answers = room - curves - hints
        parts = [Layout(self._framed_head(), size=head)]
        if curves:
            parts.append(Layout(_row(self._curves(width // CURVE_WIDTH)), size=curves))
        beside = [self._phases()] if width >= WIDE else []
        parts.append(_row([*map(Layout, beside), Layout(self._actors())]))
        if answers >= LEAST:
            parts[-1].size = side
            parts.append(Layout(self._answers(answers - FRAME)))
        if hints:
            parts.append(Layout(self._said(), size=hints))
        return _column(parts)

    def _framed_head(self) -> Panel:
        return Panel(Group(*self._head()), title=Text(printable(self._history.name)), border_style="cyan")

    def _head(self) -> list[Text]:
        history, now = self._history, self._now
        due = "" if history.steps_due is None else f" of {history.steps_due}"
        words = ["in progress" if self.goes_on else history.state, f"{history.last}{due} steps"]
        if now and self.goes_on:
            words.append(f"step {now.step}: {printable(now.phase)} for {clock(self._phase_seconds)}")
        if left := self._left():
            words.append(left)
        lines = [Text("  ·  ".join(words), no_wrap=True, overflow="ellipsis")]
        if now and self._silent is not None and self._silent >= QUIET and self.goes_on:
            lines.append(
                Text(f"no word from the driver for {clock(self._silent)}: it is frozen or was killed, or clocks differ",
                     style="bold red")
            )  # fmt: skip
        lines += [Text(f"log: {shown(text)}", style="dim", no_wrap=True, overflow="ellipsis") for text in self._log()]
        return lines

    def _left(self) -> str:
        due = self._history.steps_due
        seconds = [sum(_seconds(row).values()) for row in self._history.steps[-RECENT:]]
        if not self.goes_on or due is None or not seconds:
            return ""
        return f"{clock((due - self._history.last) * fmean(seconds))} left"

    def _log(self) -> Iterator[str]:
        """The last line of the log that is not about a step: the view shows those. None of a run that has ended."""
        if not self.goes_on:
            return iter(())
        lines = (text for _, text in reversed(self._history.log) if text and not text.startswith(("step ", " ")))
        return islice(lines, 1)

    def _curves(self, most: int) -> list[Layout]:
        """Reward, accuracy and log-prob gap beside each other, as many as have room."""
        evaluations = self._history.evaluations
        split = "validation" if any(row["split"] == "validation" for row in evaluations) else "test"
        first = "reward" if any("reward" in row for row in self._history.steps) else "loss"  # SFT has no rewards
        curves = [
            _curve(first, self._history.steps, first),
            _curve(f"{split} accuracy", [row for row in evaluations if row["split"] == split], "accuracy_strict"),
            _curve("log-prob gap", self._history.steps, "logprob_gap"),
        ]
        return [Layout(Panel(one)) for one in curves[: max(1, most)]]

    def _phases(self) -> Panel:
        """Where the time of the last steps went."""
        rows = [_seconds(row) for row in self._history.steps[-RECENT:]]
        names = list(dict.fromkeys(name for row in rows for name in row))
        total = sum(sum(row.values()) for row in rows) or 1.0
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1)
        for name in names[:PHASES]:
            seconds = sum(row.get(name, 0.0) for row in rows)
            mean = f"{seconds / len(rows):.2f} s  {100 * seconds / total:3.0f} %"
            table.add_row(Text(printable(name)), mean, Bar(total, 0, seconds, color="cyan"))
        return Panel(table, title=f"phases, mean of {len(rows)} steps")

    def _actors(self) -> Panel:
        actors = self._now.actors if self._now and self.goes_on else {}
        table = Table.grid(padding=(0, 2))
        for name, doing in islice(actors.items(), MOST_ACTORS):
            style = "dim" if doing == "idle" else "green"
            table.add_row(Text(printable(name)), Text(printable(doing), style=style))
        if more := len(actors) - MOST_ACTORS:
            table.add_row(f"and {more} more" if more > 0 else "")
        return Panel(table if actors else Text("no actors", style="dim"), title="actors")

    @property
    def _side_lines(self) -> int:
        """Lines of phases and actors."""
        actors = min(MOST_ACTORS + 1, len(self._now.actors) if self._now else 0)
        return FRAME + max(PHASES, actors)

    def _answers(self, lines: int) -> Panel:
        size = self._history.config["sampling"]["group_size"] if self._history.config else 8
        step, groups = newest(self._history, -(-lines // (size + 1)))  # the last may be cut
        table = answer_table(groups) if groups else Text("none yet", style="dim")
        return Panel(table, title=f"answers of step {step}" if groups else "answers")

    def _said(self) -> Panel:
        lines = [
            Text.assemble(
                (printable(hint.text), "bold" if hint.severity == "warning" else ""), f". {printable(hint.cure)}",
                no_wrap=True, overflow="ellipsis",
            )
            for hint in self._hints
        ]  # fmt: skip
        return Panel(Group(*lines), title="what stands out", border_style="yellow")


def _column(parts: Sequence[Layout]) -> Layout:
    layout = Layout()
    layout.split_column(*parts)
    return layout


def _row(parts: Sequence[Layout | RenderableType]) -> Layout:
    layout = Layout()
    layout.split_row(*parts)
    return layout


def _curve(title: str, rows: Sequence[dict], key: str) -> Curve:
    points = [(row["step"], value) for row in rows if (value := finite(row.get(key))) is not None]
    return Curve(title, [step for step, _ in points], [value for _, value in points])


def _seconds(row: dict) -> dict[str, float]:
    """The seconds of each phase of a step."""
    values = {key.partition("/")[2]: finite(value) for key, value in row.items() if key.startswith("seconds/")}
    return {name: value for name, value in values.items() if value is not None}
