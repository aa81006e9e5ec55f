"""The plan as text: GiB by part and phase, seconds a step, hours, and what to change if it does not fit."""

from collections.abc import Collection, Mapping
from functools import partial

from rft_cluster.common.files import size
from rft_cluster.config import Config
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.advice import advice_lines
from rft_cluster.plan.cards import Card
from rft_cluster.plan.estimate import TIGHT, Plan, evaluated, make_plan
from rft_cluster.plan.memory import GIB, PHASES, snapshot, snapshots
from rft_cluster.plan.places import Place, host_memory
from rft_cluster.plan.work import Prompts
from rft_cluster.run.inside import runs_inside
from rft_cluster.run.preflight import Checked

SHOWN = 0.05  # GiB; smaller parts are only in the sum


def print_plan(config: Config, checked: Checked, card: Card) -> None:
    """Print the plan of a checked run on such cards (on CPUs: on this machine), and advice if it does not fit."""
    prompts = {split: Prompts.of(lengths) for split, lengths in checked.prompts.items()}
    print("\n".join(plan_lines(config, checked.shapes, prompts, card)), flush=True)


def plan_lines(config: Config, shapes: Shapes, prompts: Mapping[str, Prompts], card: Card) -> list[str]:
    """The plan, and advice if it does not fit."""
    plan_of = partial(make_plan, shapes=shapes, prompts=prompts, card=card)
    plan = plan_of(config)
    lines = describe(config, shapes, plan, prompts, card)
    lines += [f"and SFT     {_between(plan_of(own).hours.values())} for {own.schedule.steps} steps in {own.run_folder}"
              for own in runs_inside(config)]  # fmt: skip
    return lines if plan.fits else [*lines, *advice_lines(config, plan_of)]


def describe(config: Config, shapes: Shapes, plan: Plan, prompts: Mapping[str, Prompts], card: Card) -> list[str]:
    """The whole plan, as lines for the user."""
    row, train = plan.row, prompts["train"]
    lines = [
        f"largest row {row.prompts:g} prompts, {row.tokens:,.0f} tokens, {row.patches:,.0f} patches (images have up to "
        f"{max(one.image for one in train.longest)} tokens, {train.mean.image} on average)"
    ]
    if config.cluster.device == "cuda":
        lines.insert(0, f"planned for {card.name}; for another card: python -m rft_cluster.plan CONFIG --gpu NAME")
    for place in plan.places:
        lines += memory_lines(place)
    lines.append(cache_line(plan))
    if config.cluster.device == "cuda":
        host = host_memory(shapes, config)
        lines.append(
            f"host memory {host.loading / GIB:.0f} GiB in all while learners load the model, {host.saving / GIB:.0f} "
            f"while their state is saved"
        )
    lines.append(snapshots_line(config, shapes))
    return [*lines, *time_lines(config, plan, prompts, card)]


def snapshots_line(config: Config, shapes: Shapes) -> str:
    one, held = snapshot(shapes, config), snapshots(shapes, config)
    what = f"snapshots   {size(int(held))} in Ray's object stores"
    if not config.cluster.snapshot_every:
        return f"{what} while a checkpoint is written; learners heal from the disk (cluster.snapshot_every=0)"
    return f"{what}: three of {size(int(one))}, and as much again if the learners are on several nodes"


def cache_line(plan: Plan) -> str:
    if plan.serves:
        return f"KV cache    {plan.cache_tokens:,.0f} tokens of prompts and completions in an engine, estimated"
    return (
        f"KV cache    DOES NOT START: room for {max(0, plan.cache_tokens):,.0f} tokens in an engine, and a prompt with "
        f"its completion may have {plan.least_tokens:,}"
    )


def memory_lines(place: Place) -> list[str]:
    """A table of the parts by phase, in GiB."""
    lines = [f"{f'GiB, {place.name}':<52}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for part in place.parts:
        held = [part.in_phase(phase) / GIB for phase in PHASES]
        if max(held) >= SHOWN:
            lines.append(f"  {part.name:<50}" + "".join(f"{gib:>10.1f}" for gib in held))
    lines.append(f"  {'in all':<50}" + "".join(f"{place.peak(phase) / GIB:>10.1f}" for phase in PHASES))
    verdict = "DOES NOT FIT" if place.free < 0 else "TIGHT" if place.free < TIGHT * place.limit else "fits"
    return [
        *lines,
        f"  {verdict}: {place.peak(place.fullest) / GIB:.1f} of {place.limit / GIB:.1f} GiB in the fullest phase "
        f"({place.fullest}), estimated",
    ]


def time_lines(config: Config, plan: Plan, prompts: Mapping[str, Prompts], card: Card) -> list[str]:
    """Seconds a step by phase, and hours."""
    lengths = list(plan.seconds)
    lines = [f"{f'seconds a step, {standing(card)}':<52}" + "".join(f"{f'{length} tokens':>12}" for length in lengths)]
    for phase in (*PHASES, "driver", "step"):
        name = "a step" if phase == "step" else phase
        if phase == "learn" and config.cluster.device == "cuda":
            name = f"learn, bound by {plan.seconds[lengths[-1]].learning.bound}"
        values = [getattr(plan.seconds[length], phase) for length in lengths]
        lines.append(f"  {name:<50}" + "".join(f"{value:>12.2g}" for value in values))
    asked = ", ".join(f"{times} x {prompts[split].count} {split}" for split, times in evaluated(config, prompts))
    steps, evaluations = _between(plan.hours.values()), _between(plan.evaluations.values())
    return [
        *lines,
        "  completions have a quarter of sampling.max_tokens, and all of it",
        f"the run     {steps} for {config.schedule.steps} steps"
        + (f" (up to {_between(plan.most.values())} with schedule.min_live)" if plan.most != plan.hours else "")
        + (f", {evaluations} for evaluations ({asked} images)" if asked else ", no evaluation")
        + (f", {_between(plan.options.values())} to ask for options" if any(plan.options.values()) else "")
        + f", without the start; {standing(card)}",
    ]


def standing(card: Card) -> str:
    """How far a time can be trusted."""
    return f"estimated; {card.record} has figures measured on this card" if card.record else "estimated, never measured"


def _between(hours: Collection[float]) -> str:
    """A range of times, e.g. `9 min to 2.1 h`."""
    low, high = _clock(min(hours)), _clock(max(hours))
    return low if low == high else f"{low} to {high}"


def _clock(hours: float) -> str:
    for unit, part in (("h", 1.0), ("min", 60.0)):
        if hours * part >= 1:
            return f"{hours * part:.2g} {unit}"
    return f"{3600 * hours:.2g} s"
