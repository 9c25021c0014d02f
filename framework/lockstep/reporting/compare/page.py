"""The report as one self-contained HTML file: no script, no network, no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lockstep.reporting.compare import cost
from lockstep.reporting.compare.claims import Claim, by_text
from lockstep.reporting.compare.figures import OWN
from lockstep.reporting.compare.groups import RunComparison
from lockstep.reporting.compare.plots import coloured
from lockstep.reporting.compare.tables import Table
from lockstep.reporting.console import shown
from lockstep.version import __version__

PROMPTS_PER_SPLIT = 6
GROUPS_WITH_SAMPLES = 3


@dataclass(frozen=True)
class SampleRow:
    """A group's responses to a prompt, one per policy (None if it has none). Groups with equal responses share a row."""

    label: str
    responses: Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class SamplePrompt:
    split: str
    prompt: str
    rows: Sequence[SampleRow]


# the page's sections: id -> (title, what it needs: a table, a figure or samples)
SECTIONS = {
    "claims": ("Claims", "claims"),
    "policies": ("Policies", "policies"),
    "tasks": ("Tasks", "tasks"),
    "against": ("Against the baseline", "against"),
    "metrics": ("Metrics of your choice", "metrics"),
    "power": ("How many seeds decide it", "power"),
    "seeds": ("Over seeds", "seeds"),
    "frontier": ("Reward against drift", "frontier"),
    "tests": ("Tests", "tests"),
    "judges": ("Judges", "judges"),
    "best-of-n": ("Best of n", "best_of"),
    "learning": ("Learning", "curves"),
    "reward-model": ("Reward model", "reward_model"),
    "losses": ("Losses", "losses"),
    "warnings": ("Warnings", "warnings"),
    "cost": ("Cost", "cost"),
    "configuration": ("Configuration", "configuration"),
    "samples": ("Samples", "samples"),
}


def render(
    c: RunComparison,
    headline: str,
    intervals: str,
    found: Sequence[Claim],
    tables: Mapping[str, Table],
    figures: Mapping[str, str],
) -> str:
    """Render the page. Jinja escapes all text, after it was made visible. Only the figures, which are ours, go in unescaped."""
    answers = samples(c)
    own = [name for name in figures if name.startswith(OWN)]
    there = {*tables, *figures, *(["samples"] if answers else []), *(["metrics"] if own else [])}
    return template(Path(__file__).parent / "page.html.jinja").render(
        c=c,
        headline=headline,
        intervals=intervals,
        contents=[(id, title) for id, (title, needed) in SECTIONS.items() if needed in there],
        colours=coloured(c),
        costs=cost.in_all(c),
        seeds_evaluated=any(len(g.evaluated_seeds) > 1 for g in c.groups),
        bands=any(len(g.seeds) > 1 for g in c.groups),
        memory=any(stage.memory for run in c.runs for stage in run.stages.values()),
        claims=by_text(found),
        tables=tables,
        figures={name: Markup(svg) for name, svg in figures.items()},
        own=own,
        samples=answers,
        sampled=sample_policies(c),
        version=__version__,
        now=datetime.now(UTC),
    )


def template(file: Path) -> jinja2.Template:
    """Load a page's template, which may include ``page.css``."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, Path(__file__).parents[1]]),
        autoescape=True,
        finalize=lambda value: shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(file.name)


def samples(c: RunComparison) -> list[SamplePrompt]:
    """The first prompts of each split, and what the policies of each group's first seed answered."""
    runs = [(g.label, g.runs[0]) for g in c.groups if g.runs[0].samples][:GROUPS_WITH_SAMPLES]
    answers = {(label, row.get("split"), row["prompt"], row["policy"]): row for label, run in runs for row in run.samples}
    policies = sample_policies(c)
    chosen = []
    for split in dict.fromkeys(row.get("split") for _, run in runs for row in run.samples):
        prompts = dict.fromkeys(row["prompt"] for _, run in runs for row in run.samples if row.get("split") == split)
        for prompt in list(prompts)[:PROMPTS_PER_SPLIT]:
            rows = {label: [answers.get((label, split, prompt, p)) for p in policies] for label, _ in runs}
            chosen.append(SamplePrompt(str(split), prompt, _merge_alike(rows)))
    return chosen


def _merge_alike(rows: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[SampleRow]:
    labels: dict[tuple[str | None, ...], list[str]] = {}
    for label, responses in rows.items():
        if any(responses):  # the group was asked this prompt
            labels.setdefault(tuple(r["response"] if r else None for r in responses), []).append(label)
    return [SampleRow(", ".join(found), rows[found[0]]) for found in labels.values()]


def sample_policies(c: RunComparison) -> list[str]:
    """The policies that have samples, in the order of the evaluation."""
    have = dict.fromkeys(row["policy"] for run in c.runs for row in run.samples)
    return [p for p in c.policies if p in have] + [p for p in have if p not in c.policies]
