"""Make what is made from the series' definitions: the Grafana dashboard and the page of all series.

    python deploy/grafana/make.py      # writes deploy/grafana/rft.json and docs/series.md

The series are in rft_cluster/cluster/metrics.py. A query names them through their definitions, so it cannot name one
that nobody exports.
"""

from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, GridPos, VariableRefresh

from rft_cluster.cluster.metrics import (
    RESTARTS,
    SERIES,
    UPDATE_BYTES,
    UPDATE_SECONDS,
    UPDATES,
    WAITING,
)
from rft_cluster.common.series import Series
from rft_cluster.config.reference import table_row
from rft_cluster.generator import engine_stats as vllm
from rft_cluster.run.series import EVALUATION, PHASE, PHASE_SECONDS, STEP

ROOT = Path(__file__).parents[2]
DASHBOARD, PAGE = ROOT / "deploy" / "grafana" / "rft.json", ROOT / "docs" / "series.md"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 8, 8  # of 24 columns; rows of 30 pixels
NODE = ("ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_gpus_utilization", "ray_node_gram_used")  # Ray's own


def chosen(series: Series) -> str:
    """The series of the run that is chosen above the panels."""
    return f'{series.exported}{{run="$run"}}'


def newest(series: Series) -> str:
    """A gauge. (Ray adds labels of its own: of the process, for example, and a run that went on had two.)"""
    return f"max by ({series.label or 'run'}) ({chosen(series)})"


def growth(series: Series, by: str = "") -> str:
    """A counter's growth a second."""
    return f"sum by ({by or series.label or 'run'}) (rate({chosen(series)}[$__rate_interval]))"


def total(series: Series) -> str:
    """A counter since the run's start. It is missing until it first counts something, which is 0 here."""
    return f"sum by ({series.label or 'run'}) ({chosen(series)}) or on () vector(0)"


def share(found: Series, asked: Series) -> str:
    """The share of what was asked for that was found. (What has found nothing yet is no series.)"""
    every = growth(asked, "generator")
    return f"({growth(found, 'generator')} or {every} * 0) / {every}"


def of_generators(series: Series) -> str:
    return f"max by (generator) ({chosen(series)})"


@dataclass(frozen=True)
class Panel:
    """`queries`: legend -> PromQL. `gpu`: without a GPU there is no data."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    meaning: str = ""
    gpu: bool = False
    states: bool = False


@dataclass
class Row:
    title: str
    panels: list[Panel] = field(default_factory=list)


def step(title: str, unit: str, **legends: str) -> Panel:
    """A panel of figures of `StepStats`: field -> legend."""
    meaning = "\n\n".join(f"{legend}: {STEP[name].meaning}" for name, legend in legends.items())
    return Panel(title, {legend: newest(STEP[name]) for name, legend in legends.items()}, unit, meaning)


# The GPUs' mean stands on the side of which there is one: of a driver that was killed, Ray shows the last phase for a
# while, beside that of the next.
GPU_BY_PHASE = f"(max by (phase) ({chosen(PHASE)}) == 1) * on () group_left () avg(ray_node_gpus_utilization)"

ROWS = [
    Row("Does it learn?", [
        Panel("Reward", {"total": newest(STEP["reward"]), "{{reward}}": newest(STEP["reward_parts"])},
              meaning="Mean over a step's completions: the weighted sum, and each reward unweighted."),
        Panel("Evaluations", {
            "{{split}}, strict": newest(EVALUATION["accuracy_strict"]),
            "{{split}}, by the published rule": newest(EVALUATION["accuracy_lenient"]),
            "{{split}}, format": newest(EVALUATION["format_rate"]),
        }, "percentunit", "Greedy answers, one an image."),
        Panel("Groups that teach", {"live": newest(STEP["live_groups"])}, "percentunit", STEP["live_groups"].meaning),
        step("Distance from the start", "short", kl="KL", entropy="entropy"),
        step("Generators and learners", "short", logprob_gap="log-prob gap"),
        step("Ratios", "short", importance="importance weight", clipped="share clipped"),
        step("Staleness", "short", staleness="mean", staleness_max="stalest token"),
        step("Loss and gradient", "short", loss="loss", grad_norm="gradient norm"),
        step("Learning rate", "sci", learning_rate="learning rate"),
        step("Length of completions", "short", completion_tokens="tokens"),
        step("Cut at max_tokens", "percentunit", cut_short="completions"),
        Panel("Groups and updates", {
            "groups": total(STEP["groups"]),
            "updates": total(STEP["updates"]),
        }, meaning="In total, since the run's start."),
        Panel("What did not count", {
            "groups without a live advantage": total(STEP["skipped_groups"]),
            "updates left out": total(STEP["skipped"]),
            "completions without a reward": total(STEP["reward_failures"]),
            "{{reward}} failed": total(STEP["failures"]),
        }, meaning="In total, since the run's start."),
    ]),
    Row("Where does the time go?", [
        Panel("Phase", {"{{phase}}": newest(PHASE)}, meaning=PHASE.meaning, states=True),
        Panel("Share of the time", {"{{phase}}": growth(PHASE_SECONDS)}, "percentunit", PHASE_SECONDS.meaning),
        Panel("GPU use by phase", {"{{phase}}": GPU_BY_PHASE}, "percent",
              "Mean over all GPUs of the cluster.", gpu=True),
        step("Steps", "short", step="step", oldest_version="oldest version that wrote a token"),
        Panel("Tokens a second", {
            "of a step": newest(STEP["tokens_per_second"]),
            "sampled": growth(STEP["tokens"]),
            "trained": growth(STEP["tokens_trained"]),
        }, meaning="Of a step: sampled tokens by the seconds of its stages. The others: over all of the time."),
        Panel("Seconds of a weight update", {"seconds": f"{growth(UPDATE_SECONDS)} / {growth(UPDATES)}"}, "s",
              UPDATE_SECONDS.meaning),
        Panel("Bytes of weights a second", {"while sent": f"{growth(UPDATE_BYTES)} / {growth(UPDATE_SECONDS)}"}, "Bps",
              UPDATE_BYTES.meaning),
    ]),
    Row("What do the roles do?", [
        Panel("Prompts that wait for a generator", {"prompts": newest(WAITING)}, meaning=WAITING.meaning),
        Panel("Requests in the engines", {
            "{{generator}} running": of_generators(vllm.RUNNING), "{{generator}} waiting": of_generators(vllm.WAITING),
        }),
        Panel("KV cache in use", {"{{generator}}": of_generators(vllm.CACHE_USE)}, "percentunit"),
        Panel("Tokens a second of the engines", {
            "{{generator}} sampled": growth(vllm.TOKENS, "generator"),
            "{{generator}} prefilled": growth(vllm.PROMPT_TOKENS, "generator"),
        }),
        Panel("Found in the engines' caches", {
            "{{generator}} prefix": share(vllm.PREFIX_FOUND, vllm.PREFIX_ASKED),
            "{{generator}} images": share(vllm.IMAGES_FOUND, vllm.IMAGES_ASKED),
        }, "percentunit"),
        Panel("Restarts", {"{{actor}}": total(RESTARTS), "steps from the journal": total(STEP["replayed"])},
              meaning=RESTARTS.meaning),
    ]),
    Row("Is there room?", [
        Panel("Peak memory of a learner", {"fullest learner": newest(STEP["memory_gib"])}, "gbytes",
              STEP["memory_gib"].meaning),
        Panel("Activations", {"fullest learner": newest(STEP["activation_gib"])}, "gbytes",
              STEP["activation_gib"].meaning, gpu=True),
        Panel("CPUs", {"{{instance}}": NODE[0]}, "percent"),
        Panel("Memory", {"{{instance}}": NODE[1]}, "bytes"),
        Panel("GPUs", {"{{instance}} {{GpuIndex}}": NODE[2]}, "percent", gpu=True),
        Panel("GPU memory", {"{{instance}} {{GpuIndex}}": NODE[3]}, "mbytes", gpu=True),
    ]),
]  # fmt: skip


def dashboard_json() -> str:
    board = (
        dashboard.Dashboard("rft_cluster")
        .uid("rft-cluster")
        .tags(["rft_cluster", "ray"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query(f"label_values({STEP['step'].exported}, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    )
    top, numbers = 0, count(1)
    for row in ROWS:
        board.with_row(dashboard.Row(row.title).grid_pos(GridPos(h=1, w=24, x=0, y=top)).id(next(numbers)))
        top += 1
        for place, panel in enumerate(row.panels):
            across, down = place % (24 // WIDTH), place // (24 // WIDTH)
            position = GridPos(h=HEIGHT, w=WIDTH, x=across * WIDTH, y=top + down * HEIGHT)
            board.with_panel(drawn(panel).grid_pos(position).id(next(numbers)))
        top += -(-len(row.panels) // (24 // WIDTH)) * HEIGHT
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def drawn(panel: Panel) -> timeseries.Panel | statetimeline.Panel:
    meaning = panel.meaning + ("\n\nNo data without GPUs." if panel.gpu else "")
    if panel.states:
        made = statetimeline.Panel().show_value(VisibilityMode.NEVER)
    else:
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        made = timeseries.Panel().unit(panel.unit).legend(legend.show_legend(True)).axis_soft_min(0)
    made.title(panel.title).description(meaning.strip()).datasource(SOURCE)
    for name, (legend_format, query) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        made.with_target(prometheus.Dataquery().ref_id(name).expr(query).legend_format(legend_format).range())
    return made


HEAD = """# Series in Prometheus

```bash
# on the head node, with Prometheus as in watching.md
curl 'http://127.0.0.1:9090/api/v1/query?query=ray_rft_reward'
```

Ray exports these series while a run goes on ([watching.md](watching.md)). Each has the label `run`, the run's name;
vLLM's have `generator`, too, and the third column names one more. Ray puts `ray_` before each name and `_total` behind
a counter's. A counter is missing until it first counts something. A gauge stays as it was if a step has no such figure.

| series | kind | label | unit | |
|---|---|---|---|---|
"""


def page() -> str:
    rows = (
        table_row(f"`{one.exported}`", one.kind, f"`{one.label}`" if one.label else "", one.unit, one.meaning)
        for one in SERIES
    )
    return HEAD + "\n".join(rows) + "\n"


def panels() -> list[Panel]:
    return [panel for row in ROWS for panel in row.panels]


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard_json())
    PAGE.write_text(page())
