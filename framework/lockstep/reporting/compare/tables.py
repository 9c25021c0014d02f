"""The comparison as tables: built once, shown in the terminal, in Markdown, in LaTeX and on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

from lockstep.learning import numerics
from lockstep.reporting.compare import cost, decisions, versus
from lockstep.reporting.compare.claims import GAIN, PERCENT, SCORE, Claim, by_text, headline_metric, show
from lockstep.reporting.compare.decisions import Correction
from lockstep.reporting.compare.groups import RunComparison, RunGroup
from lockstep.reporting.compare.records import Estimate
from lockstep.reporting.compare.versus import Versus
from lockstep.reporting.markdown import escaped

# metric -> (title, number format)
POLICY_METRICS = {
    "gold": ("gold score", SCORE),
    "gain": ("gain over the round before", "+" + SCORE),
    "score": ("reward model's score", SCORE),
    "win_rate": ("win rate against {baseline}", PERCENT),
    "length_controlled_win_rate": ("  at equal length", PERCENT),
    "ability": ("ability", PERCENT),
    "text_loss": ("loss on raw text, nats per token", ".3f"),
    "kl": ("KL to {baseline}, nats", SCORE),
    "length": ("length, tokens", SCORE),
    "finished": ("finished", PERCENT),
}
REWARD_MODEL_METRICS = {
    "labeler_agreement/gold": ("a single labeler vs gold", PERCENT),
    "accuracy/gold": ("reward model vs gold", PERCENT),
    "accuracy_over_labeler/gold": ("  above the labelers, pair by pair", GAIN),
    "accuracy/training_labelers": ("reward model vs training labelers", PERCENT),
    "accuracy/heldout_labelers": ("reward model vs held-out labelers", PERCENT),
    "prefers_longer/labelers": ("labelers prefer the longer", PERCENT),
    "prefers_longer/reward_model": ("  and the reward model does", PERCENT),
    "ece": ("calibration error", ".3f"),
    "brier": ("Brier score", ".3f"),
}
BEST_OF = {"gold": ("gold score", SCORE), "score": ("reward model's score", SCORE), "kl": ("KL to the policy, nats", SCORE)}
MOST_COLUMNS = 5  # more groups than this become rows, so that a sweep still fits a terminal

Cell = Callable[[RunGroup, str], str]


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    headings: frozenset[int] = frozenset()  # rows that name the block below them


def all_tables(
    c: RunComparison, found: Sequence[Claim], against: Sequence[Versus], correction: Correction = "holm", difference: float = 0.0
) -> dict[str, Table]:
    """Every table that has rows. ``difference``: show how many seeds this difference needs; 0: no such column."""
    every = {
        "claims": checklist(found),
        "policies": policies(c),
        "tests": tests(c),
        "judges": judges(c),
        "best_of": best_of(c),
        "tasks": tasks(c),
        "seeds": over_seeds(c),
        "against": against_baseline(c, against, correction),
        "power": power(c, against, difference),
        "reward_model": reward_model(c),
        "warnings": warnings(c),
        "cost": costs(c),
        "configuration": configuration(c),
    }
    return {name: table for name, table in every.items() if table.rows}


def gold_parts(c: RunComparison) -> list[str]:
    """The parts of the gold score, which the runs' data name: what no evaluation measures by itself."""
    others = {*POLICY_METRICS, "turns", "sampler_mismatch", *c.judges, *c.tests}
    return [metric for metric in c.measured if "/" not in metric and metric not in others]


def policies(c: RunComparison) -> Table:
    """Every metric on every split, with the parts of the gold score beneath it."""
    gold, gain, *others = POLICY_METRICS
    return _policy_table(c, [(split, metric) for split in c.splits for metric in (gold, gain, *gold_parts(c), *others)])


def policies_in_short(c: RunComparison) -> Table:
    """The main numbers, for a terminal: what was gained, and at what cost."""
    score = "gold" if c.has("gold") else "score"
    rest = [split for split in c.splits if split != c.split]
    return _policy_table(c, [*((c.split, m) for m in (score, "gain", "win_rate", "ability", "kl")), *((s, score) for s in rest)])


def _policy_table(c: RunComparison, chosen: Sequence[tuple[str, str]]) -> Table:
    blocks: dict[str, Cell] = {}
    for split, metric in chosen:
        if c.has(metric, split):
            title, form = POLICY_METRICS.get(metric, (metric, SCORE))
            name = title.replace("{baseline}", c.baseline or "") + ("" if split == c.split else f", {split}")
            blocks[name] = lambda g, p, s=split, m=metric, f=form: _cell(c, g.policy(s, p, m), f)
    return _table("Policies", c, c.policies, blocks)


def tests(c: RunComparison) -> Table:
    """The multiple-choice tests that the data configure: truth and bias before and after each stage."""
    split = next((split for split in c.splits if c.tests and c.has(c.tests[0], split)), None)
    return _table("Tests", c, c.policies if split else [], {metric: _test(c, split or "", metric) for metric in c.tests})


def _test(c: RunComparison, split: str, metric: str) -> Cell:
    form = ".3f" if metric.endswith("/entropy") else PERCENT
    return lambda g, policy: _cell(c, g.policy(split, policy, metric), form)


def judges(c: RunComparison) -> Table:
    """Each judge's scores of each policy on each split: splits (attackers) across, policies (defenders) down."""
    rows: list[list[str]] = []
    starts = set()
    for name in c.judges:
        for g in c.groups:
            cells = [[policy, *(show(g.policy(split, policy, name), SCORE) for split in c.splits)] for policy in c.policies]
            if any(any(row[1:]) for row in cells):
                starts.add(len(rows))
                rows += [[f"{name}, {g.label}" if len(c.groups) > 1 else name, *[""] * len(c.splits)], *cells]
    return Table("Judges, by policy and split", ["", *c.splits], rows, frozenset(starts))


def best_of(c: RunComparison) -> Table:
    """For each policy, the best of n samples by the reward model, with the bound on its KL."""
    items = {f"best of {n}, KL at most {numerics.best_of_kl_bound(n):.2f}": n for n in c.best_of}
    blocks: dict[str, Cell] = {}
    for policy in c.policies:
        for metric, (title, form) in BEST_OF.items():
            if any(c.has(f"best_of_{n}/{metric}", c.split) for n in c.best_of):
                blocks[f"{policy}: {title}"] = _best_of_cell(c, policy, metric, form, items)
    return _table("Best of n", c, list(items), blocks)


def _best_of_cell(c: RunComparison, policy: str, metric: str, form: str, items: Mapping[str, int]) -> Cell:
    return lambda g, item: _cell(c, g.policy(c.split or "", policy, f"best_of_{items[item]}/{metric}"), form)


def tasks(c: RunComparison) -> Table:
    """Public benchmarks: each policy's value and its standard error."""
    return _table("Tasks: value ± standard error", c, c.stage_names, {name: _task(name) for name in c.tasks})


def _task(name: str) -> Cell:
    def cell(g: RunGroup, policy: str) -> str:
        found = g.task(policy, name)
        if found is None:
            return ""
        return f"{found.mean:.4f} ± {found.standard_error:.4f}" if found.low < found.high else f"{found.mean:.4f}"

    return cell


def reward_model(c: RunComparison) -> Table:
    measured = c.reward_model_metrics
    lines = {title: (metric, form) for metric, (title, form) in REWARD_MODEL_METRICS.items() if metric in measured}
    lines |= {metric: (metric, SCORE) for metric in measured if metric not in REWARD_MODEL_METRICS}

    def cell(g: RunGroup, title: str) -> str:
        metric, form = lines[title]
        return _cell(c, g.reward_model(metric), form)

    return _table("Reward model", c, list(lines), {"": cell})


def over_seeds(c: RunComparison) -> Table:
    """Interquartile means over seeds, for policies trained against a reward. No rows if every group has one seed."""
    metrics = [m for m in ("gold", "score", "win_rate", "ability", "kl") if c.has(m)]
    rows: list[list[str]] = []
    starts = set()
    wanted = [(policy, split) for policy in c.after_baseline or c.policies[-1:] for split in c.splits]
    for policy, split in wanted if any(len(g.evaluated_seeds) > 1 for g in c.groups) else ():
        found = [_seeds_row(g, split, policy, metrics) for g in c.groups]
        if any(found):
            starts.add(len(rows))
            rows += [[f"{policy}, {split}", *[""] * (len(metrics) + 1)], *filter(None, found)]
    header = ["", *(POLICY_METRICS[m][0].format(baseline=c.baseline) for m in metrics), "seeds"]
    return Table("Over seeds: interquartile means", header, rows, frozenset(starts))


def _seeds_row(g: RunGroup, split: str, policy: str, metrics: Sequence[str]) -> list[str] | None:
    cells = [show(versus.over_seeds(g, split, policy, m), POLICY_METRICS[m][1]) for m in metrics]
    scores = [seeds for m in metrics for seeds in g.scores(split, policy, m).values()]
    seeds = sorted({seed for found in scores for seed in found})
    tasks = f", each in {len(set(g.tasks))} settings" if len(set(g.tasks)) > 1 else ""
    alone = " (one: no interval)" if len(seeds) == 1 else ""
    return [g.label, *cells, ", ".join(map(str, seeds)) + tasks + alone] if seeds else None


def against_baseline(
    c: RunComparison, found: Sequence[Versus], correction: Correction = "holm", only: str | None = None
) -> Table:
    """Groups against the baseline group, seed by seed. A row names the seeds that are on both sides, and those that are not.
    ``only``: show the rows of this metric; their p-values are still corrected for all rows."""
    values = decisions.corrected([v.test.p for v in found if v.test], correction)
    tested, left = len(values), iter(values)
    p_values = [_p(next(left)) if v.test else "" for v in found]
    rows: list[list[str]] = []
    starts = set()
    block = None
    for v, p in zip(found, p_values, strict=True):
        if only not in (None, v.metric):
            continue
        title, form = POLICY_METRICS[v.metric]
        if block != (block := (v.policy, v.metric)):
            starts.add(len(rows))
            rows.append([f"{v.policy}: {title.format(baseline=c.baseline)}", *[""] * 5])
        difference = show(v.difference, "+" + form) or "no seed on both sides"
        seeds = ", ".join(map(str, v.seeds)) + (f" (not paired: {'; '.join(v.unpaired)})" if v.unpaired else "")
        rows.append([*v.names, difference, _always(v.improvement, v.seeds), p, seeds])
    header = ["", "against", "difference, seed by seed", "probability of improvement", "p", "seeds"]
    how = f": p {decisions.CORRECTIONS[correction]} over {tested}" if tested > 1 else ""
    return Table(f"Against the baseline{how}", header, rows, frozenset(starts))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def power(c: RunComparison, against: Sequence[Versus], difference: float = 0.0) -> Table:
    """How many seeds decide each difference, given how much it varies from seed to seed."""
    metric = headline_metric(c)
    within = versus.gains(c, metric) if metric in ("gold", "score") else []
    named = [(f"{gain.policy} over {c.baseline}, {gain.group.label}", gain.test) for gain in within]
    named += [(f"{v.policy}: {v.names[0]} over {v.names[1]}", v.test) for v in against if v.test and v.metric == metric]
    if not named:
        return Table("How many seeds decide it", [], [])
    form = POLICY_METRICS[metric or "gold"][1]
    rows = []
    for name, test in named:
        wanted_too = [difference] if difference else []
        needed = [decisions.seeds_needed(each, test.deviation) for each in (test.mean, *wanted_too)]
        least = decisions.least_difference(test.deviation, test.seeds)
        cells = [f"{test.mean:+{form}}", f"{test.deviation:{form}}", str(test.seeds), f"{least:{form}}"]
        rows.append([name, *cells, *(f"over {decisions.MOST_SEEDS}" if n is None else str(n) for n in needed)])
    wanted = [f"{difference:g} needs"] if difference else []  # short, as a terminal has 80 columns
    header = ["", "difference", "deviation", "seeds", "decided from", "it needs", *wanted]
    return Table(f"How many seeds decide a difference in {metric}", header, rows)


def _always(e: Estimate, seeds: Sequence[int]) -> str:
    """The interval has no width if all runs of one side are better. It is shown even then, but not for a single seed."""
    return f"{e.mean:.0%} [{e.low:.0%}, {e.high:.0%}]" if len(seeds) > 1 else f"{e.mean:.0%}"


def in_short(
    c: RunComparison, against: Sequence[Versus], every: Mapping[str, Table], correction: Correction, with_power: bool
) -> dict[str, Table]:
    """Tables for a terminal: only the main rows of policies and cost, and only the headline's metric of differences."""
    short = {"policies": policies_in_short(c), "cost": cost_in_short(c)}
    short["against"] = against_baseline(c, against, correction, only=headline_metric(c) or "gold")
    on_the_page = ("seeds", "best_of", "judges", *(() if with_power else ("power",)))
    return {name: table for name in every if name not in on_the_page and (table := short.get(name, every[name])).rows}


def warnings(c: RunComparison) -> Table:
    """The warnings of `lockstep.reporting.health` while stages trained: in which runs, and at which step first."""
    rows = []
    for g in c.groups:
        first: dict[tuple[str, str], dict[int, int]] = {}
        for run in g.runs:
            for stage in run.stages.values():
                for found in stage.health:
                    first.setdefault((stage.name, found["name"]), {}).setdefault(run.seed, found["step"])
        for (stage, name), steps in first.items():
            rows.append([g.label, stage, name, ", ".join(f"seed {seed} at step {step}" for seed, step in steps.items())])
    return Table("Warnings while training", ["", "stage", "warning", "where"], rows)


def cost_in_short(c: RunComparison) -> Table:
    """Seconds, speed and memory, per backend."""
    return costs(dataclasses.replace(c, groups=cost.by_backend(c)), steps=False)


def costs(c: RunComparison, steps: bool = True) -> Table:
    blocks: dict[str, Cell] = {
        "seconds": _seconds,
        "tokens per second": lambda g, s: _number(cost.speed(g, s)),
        "episodes": lambda g, s: _number(cost.episodes(g, s)),
        "peak memory, GiB": lambda g, s: _number(cost.memory(g, s), ".2f"),
    }
    for name in cost.parts(c) if steps else ():
        blocks[f"seconds per step: {name}"] = lambda g, s, n=name: _number(cost.part(g, s, n), ".2f")
    return _table("Cost", c, c.stage_names, blocks)


def _seconds(g: RunGroup, stage: str) -> str:
    unfinished = ", ".join(sorted({s.status for s in g.stages(stage)} - {"done"}))
    text = _number(cost.seconds(g, stage))
    return f"{text} ({unfinished})".strip() if unfinished else text


def _number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None else f"{value:{form}}"


def _table(title: str, c: RunComparison, items: Sequence[str], blocks: Mapping[str, Cell]) -> Table:
    """Blocks stacked below each other: items down and groups across, or the other way round for many groups."""
    labels = [g.label for g in c.groups]
    rows: list[list[str]] = []
    starts = set()
    for name, cell in blocks.items():
        grid = [[item, *(cell(g, item) for g in c.groups)] for item in items]
        grid = [row for row in grid if any(row[1:])]
        if _wide(c):
            grid = [[label, *(cell(g, item) for item in items)] for label, g in zip(labels, c.groups, strict=True)]
        if name and any(any(row[1:]) for row in grid):
            starts.add(len(rows))
            rows.append([name, *[""] * (len(grid[0]) - 1)])
        rows += grid if any(any(row[1:]) for row in grid) else []
    return Table(title, ["", *(items if _wide(c) else labels)], rows, frozenset(starts))


def _cell(c: RunComparison, estimate: Estimate | None, form: str) -> str:
    """The interval in full, or its half width if there are many columns."""
    if estimate is None or not _wide(c) or estimate.low == estimate.high:
        return show(estimate, form)
    return f"{estimate.mean:{form}} ±{(estimate.high - estimate.low) / 2:{form}}"


def configuration(c: RunComparison) -> Table:
    lines = list(c.differing.items())
    if _wide(c):
        rows = [[g.label, *(values[i] for _, values in lines)] for i, g in enumerate(c.groups)]
        return Table("Where the configurations differ", ["run", *(key for key, _ in lines)], rows if lines else [])
    return Table("Where the configurations differ", ["key", *(g.label for g in c.groups)], [[k, *v] for k, v in lines])


def checklist(found: Sequence[Claim]) -> Table:
    """One row per claim: its verdict, or its verdicts if the groups differ."""
    rows = []
    for text, members in by_text(found):
        where = {v: ", ".join(m.where for m in members if m.verdict == v) for v in ("yes", "unclear", "no")}
        where = {verdict: labels for verdict, labels in where.items() if labels}
        verdict = "; ".join(f"{v}: {labels}" for v, labels in where.items()) if len(where) > 1 else next(iter(where))
        rows.append([text, verdict])
    return Table("Claims", ["claim", "holds"], rows)


def _wide(c: RunComparison) -> bool:
    return len(c.groups) > MOST_COLUMNS


# ----------------------------------------------------------------------------------------------------------- rendering

VERDICT_STYLE = {"yes": "green", "unclear": "yellow", "no": "red"}


def to_rich(table: Table) -> RichTable:
    rich = RichTable(header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in table.header:
        first = name == table.header[0]
        rich.add_column(name, no_wrap=first, overflow="ellipsis" if first else "fold")
    for i, row in enumerate(table.rows):
        if i in table.headings and i > 0:
            rich.add_section()
        rich.add_row(*row, style="bold" if i in table.headings else VERDICT_STYLE.get(row[1]))
    return rich


def to_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "---|" * len(table.header)
    rows = [list(map(escaped, row)) for row in table.rows]
    rows = [[f"**{row[0]}**", *row[1:]] if i in table.headings else row for i, row in enumerate(rows)]
    return "\n".join([f"## {escaped(table.title)}", "", line(list(map(escaped, table.header))), rule, *map(line, rows)])


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$"}
_TEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def to_latex(table: Table) -> str:
    """A ``tabular`` that needs no packages, with the title as a comment."""

    def line(row: Sequence[str], bold: bool = False) -> str:
        cells = ["".join(_TEX.get(mark, mark) for mark in cell) for cell in row]
        cells[0] = rf"\textbf{{{cells[0]}}}" if bold else cells[0]
        return " & ".join(cells) + r" \\"

    rows = [line(row, bold=i in table.headings) for i, row in enumerate(table.rows)]
    title, columns = " ".join(table.title.split()), "l" * len(table.header)
    begin = [f"% {title}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", line(table.header), r"\hline"]
    return "\n".join([*begin, *rows, r"\hline", r"\end{tabular}"])
