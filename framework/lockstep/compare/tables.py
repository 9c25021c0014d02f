"""The comparison as tables: built once, written to the terminal, to Markdown and to the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as RichTable
from rich.text import Text

from lockstep.compare.claims import Claim, number
from lockstep.compare.groups import Comparison, Group
from lockstep.compare.records import Estimate

# metric -> (title, is it a proportion?)
POLICY_METRICS = {
    "gold": ("gold score", False),
    "helpful": ("helpful", False),
    "truthful": ("truthful", False),
    "harmless": ("harmless", False),
    "score": ("reward model's score", False),
    "win_rate": ("win rate against {baseline}", True),
    "ability": ("ability", True),
    "kl": ("KL to {baseline}, nats per response", False),
    "length": ("length, tokens", False),
    "finished": ("finished", True),
}
REWARD_MODEL_METRICS = {
    "labeler_agreement/gold": ("a single labeler, against gold", True),
    "accuracy/gold": ("reward model, against gold", True),
    "accuracy/training_labelers": ("reward model, against training labelers", True),
    "accuracy/heldout_labelers": ("reward model, against held-out labelers", True),
    "ece": ("expected calibration error", False),
    "brier": ("Brier score", False),
}
MOST_COLUMNS = 5  # more groups than this become rows, so that a sweep still fits a terminal


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    section_starts: frozenset[int] = field(default_factory=frozenset)  # rows that begin a new block


def tables(c: Comparison, found: Sequence[Claim]) -> list[Table]:
    """Everything that the numbers are good for; a table without rows is left out."""
    every = [policies(c), reward_model(c), stages(c), configuration(c), checklist(found)]
    return [table for table in every if table.rows]


def policies(c: Comparison) -> Table:
    """Metric by metric: policies down, groups across; the other way round for many groups."""
    rows: list[list[str]] = []
    starts = set()
    across = c.policies if _wide(c) else [g.label for g in c.groups]
    for split in c.splits:
        for metric, (title, percent) in POLICY_METRICS.items():
            if not c.has(metric, split):
                continue

            def cell(g: Group, policy: str, metric=metric, percent=percent, split=split) -> str:
                return show(g.policy(split, policy, metric), percent)

            name = title.format(baseline=c.baseline) + ("" if split == c.split else f" ({split})")
            starts.add(len(rows))
            if _wide(c):
                block = [[g.label, *(cell(g, p) for p in c.policies)] for g in c.groups]
            else:
                block = [[p, *(cell(g, p) for g in c.groups)] for p in c.policies if any(cell(g, p) != "" for g in c.groups)]
            rows += [[name if i == 0 else "", *row] for i, row in enumerate(block)]
    corner = "run" if _wide(c) else "policy"
    return Table(f"Policies on {c.split} prompts", ["", corner, *across], rows, frozenset(starts))


def reward_model(c: Comparison) -> Table:
    known = [m for m in REWARD_MODEL_METRICS if m in c.reward_model_metrics]
    rest = [m for m in c.reward_model_metrics if m not in REWARD_MODEL_METRICS]
    lines = [(*REWARD_MODEL_METRICS.get(m, (m, False)), m) for m in [*known, *rest]]
    return _by_group("Reward model", c, [(t, lambda g, m=m, p=p: show(g.reward_model(m), p)) for t, p, m in lines])


def stages(c: Comparison) -> Table:
    """Seconds of each stage, and how fast it went."""
    lines: list[tuple[str, Callable[[Group], str]]] = []
    for name in c.stage_names:
        lines.append((f"{name}, seconds", lambda g, n=name: _seconds(g, n)))
    for name in c.stages_with("perf/tokens_per_second"):
        lines.append((f"{name}, tokens per second", lambda g, n=name: _speed(g, n)))
    return _by_group("Time", c, lines)


def configuration(c: Comparison) -> Table:
    lines = list(c.differing.items())
    if _wide(c):
        rows = [[g.label, *(values[i] for _, values in lines)] for i, g in enumerate(c.groups)]
        return Table("Where the configurations differ", ["run", *(key for key, _ in lines)], rows if lines else [])
    return Table("Where the configurations differ", ["key", *(g.label for g in c.groups)], [[k, *v] for k, v in lines])


def checklist(found: Sequence[Claim]) -> Table:
    return Table("Claims", ["", "claim", "run", "because"], [[f.verdict, f.text, f.where, f.because] for f in found])


def _by_group(title: str, c: Comparison, lines: Sequence[tuple[str, Callable[[Group], str]]]) -> Table:
    if _wide(c):
        rows = [[g.label, *(cell(g) for _, cell in lines)] for g in c.groups]
        return Table(title, ["run", *(name for name, _ in lines)], rows if lines else [])
    return Table(title, ["", *(g.label for g in c.groups)], [[name, *(cell(g) for g in c.groups)] for name, cell in lines])


def _wide(c: Comparison) -> bool:
    return len(c.groups) > MOST_COLUMNS


def _seconds(g: Group, name: str) -> str:
    found = g.stages(name)
    seconds = [s.seconds for s in found if s.seconds is not None]
    unfinished = sorted({s.status for s in found} - {"done"})
    text = number(sum(seconds) / len(seconds)) if seconds else ""
    return f"{text} ({', '.join(unfinished)})".strip() if unfinished else text


def _speed(g: Group, name: str) -> str:
    speed = g.curve(name, "perf/tokens_per_second", points=1)
    return f"{speed.mean[0]:,.0f}" if speed else ""


def show(e: Estimate | None, percent: bool = False) -> str:
    """'1.41 [1.30, 1.52]', or nothing; no interval where there is none."""
    if e is None:
        return ""
    mean = number(e.mean, percent)
    return mean if e.low == e.high else f"{mean} [{number(e.low, percent)}, {number(e.high, percent)}]"


# ----------------------------------------------------------------------------------------------------------- rendering

VERDICT_STYLE = {"yes": "green", "unclear": "yellow", "no": "red"}


def to_rich(table: Table) -> RichTable:
    rich = RichTable(title=table.title, title_justify="left", title_style="bold", header_style="dim")
    for i, name in enumerate(table.header):
        rich.add_column(name, justify="left" if i < 2 or table.title == "Claims" else "right")
    for i, row in enumerate(table.rows):
        if i in table.section_starts:
            rich.add_section()
        rich.add_row(*map(Text, row), style=VERDICT_STYLE.get(row[0]))
    return rich


def to_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(table.header)
    return "\n".join([f"## {table.title}", "", line(table.header), rule, *map(line, table.rows)])
