"""Samples fresh responses of policies for labelers to rank, to collect feedback on the current policy (Ouyang et al. 2022,
section 3.1; Bai et al. 2022, section 4.5, "iterated online RLHF").

Prompts are drawn without replacement from the training split, in one order per run: no round repeats a prompt of an earlier
round until all have been used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from lockstep.config.schema import setting
from lockstep.data.labels import candidates_in, candidates_line
from lockstep.errors import DataError, listing
from lockstep.interfaces import DataSource, Label, Policy, RewardModel
from lockstep.learning import numerics
from lockstep.learning.randomness import indices_of_round, token_seeds
from lockstep.learning.rollout import Sampler, score
from lockstep.learning.served import Served
from lockstep.processes import Processes
from lockstep.storage.files import write_text
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Candidates, Comparison, Fit


@dataclass(frozen=True)
class CollectionConfig:
    """The settings of a collection."""

    prompts: int = setting(500, "Fresh prompts in each collection, or all there are.", least=1)
    samples: int = setting(4, "Responses per prompt, divided among the policies (InstructGPT: 4 to 9).", least=2, most=64)
    temperature: float = setting(1.0, "For sampling.", above=0)
    batch_size: int = setting(100, "Responses per forward pass.", least=1)
    lengths: Lengths = setting(Lengths(), "Limits in tokens.")
    stop_strings: tuple[str, ...] = setting((), "Text that ends a response, as EOS does; or special tokens by name.")
    heldout_groups: tuple[str, ...] = setting((), "Groups of labelers whose labels are counted and measured, but not trained on.")

    def arithmetic(self, data: DataSource) -> str:
        total = len(data.prompts("train"))
        few = f", all there are of {self.prompts}" if total < self.prompts else ""
        return f"{self.samples} responses to each of {min(self.prompts, total)} prompts{few}"


@dataclass
class Collector:
    """Samples candidates. ``round`` is the collection's number, from 1; ``order_seed`` decides the order of prompts."""

    config: CollectionConfig
    data: DataSource
    tokenizer: Tokenizer
    reward_model: RewardModel | None
    seed: int
    order_seed: int
    round: int
    engine: Served | None = None
    fits: dict[str, Fit] = field(default_factory=dict)

    def collect(
        self, load: Callable[[str], Policy], policies: Mapping[str, str], progress: Callable[[str], None]
    ) -> list[Candidates]:
        """Sample candidates from ``policies``, {stage: identity}. They take turns: response j to a prompt is by policy j modulo
        their number. Identical responses to a prompt are kept once, as the first policy's; prompts with fewer than two different
        responses are left out."""
        c, names = self.config, list(policies)
        prompts = self.data.prompts("train")
        count = min(c.prompts, len(prompts))
        chosen = [prompts[i] for i in indices_of_round(self.order_seed, "collection", len(prompts), count, self.round)]
        fit = self.fits["train prompts"] = Fit("train prompts")
        chosen, ids = encoding.encode_prompts(self.tokenizer, chosen, c.lengths, fit)
        sampler = Sampler(Stops(self.tokenizer, c.stop_strings), c.lengths, c.temperature, c.batch_size, engine=self.engine)
        texts: list[dict[str, tuple[str, float]]] = [{} for _ in chosen]
        for number, name in enumerate(names):
            share = len(range(number, c.samples, len(names)))
            progress(name)
            seeds = token_seeds(self.seed, f"collection {number}", 0, share * len(ids), c.lengths.response)
            samples = sampler.sample(load(name), chosen, ids, seeds)
            scores = np.zeros(len(seeds)) if self.reward_model is None else score(self.reward_model, samples)[0]
            for row, text in enumerate(samples.responses.texts):
                texts[row // share].setdefault(text, (policies[name], float(scores[row])))
        return [
            Candidates(
                f"{(self.round - 1) * c.prompts + i:07d}", prompt, tuple(found), tuple(policy for policy, _ in found.values()),
                () if self.reward_model is None else tuple(value for _, value in found.values()), self.seed,
            )
            for i, (prompt, found) in enumerate(zip(chosen, texts, strict=True)) if len(found) > 1
        ]  # fmt: skip


def kept(file: Path, collect: Callable[[], list[Candidates]], processes: Processes) -> list[Candidates]:
    """The candidates in a file. If it does not exist, they are collected and written to it first, all at once."""
    if not processes.share(file.exists):
        found = collect()
        processes.share(lambda: write_text(file, "".join(map(candidates_line, found))))
    return candidates_in(file)


def labelled(candidates: Sequence[Candidates], labels: Sequence[Label], without: Sequence[str] = ()) -> list[Comparison]:
    """The labels as comparisons, in the order of the candidates, except those of the groups ``without``.

    Raises:
      DataError: no label remains.
    """
    if not labels:
        raise DataError(f"None of the {len(candidates)} candidates was labelled, so there is nothing to learn from.")
    labels = [label for label in labels if label.group not in without]
    if not labels:
        raise DataError(f"All labels are of groups that are held out: {listing(without)}. Others have to label, too.")
    order = {each.id: position for position, each in enumerate(candidates)}
    found = sorted(labels, key=lambda label: (order[label.id], label.labeler))
    return [
        Comparison((about := candidates[order[label.id]]).prompt, about.completions, label.ranks, label.labeler, label.group)
        for label in found
    ]


def measures(
    candidates: Sequence[Candidates], labels: Sequence[Label], data: DataSource, policies: Mapping[str, str]
) -> dict[str, float]:
    """Statistics of the labels: how many there are, the share of pairs that are ties, agreement with gold if it is known,
    agreement between labelers of the same candidates, and each policy's share of wins against the others (ties count half).
    ``policies`` is {stage: identity}."""
    comparisons = labelled(candidates, labels)
    pairs = [(i, j) for c in comparisons for i, j in combinations(c.ranks, 2)]
    found = {
        "labels": float(len(labels)),
        "labelers": float(len({label.labeler for label in labels})),
        "prompts": float(len({label.id for label in labels})),
        "ties": float(np.mean([i == j for i, j in pairs])),
    }
    found |= _agreement_with_gold(comparisons, data) | _agreement_of_labelers(labels)
    wins: dict[str, list[float]] = {}
    by_id = {each.id: each for each in candidates}
    for label in labels:
        writers = by_id[label.id].policies
        for i, j in combinations(range(len(writers)), 2):
            if writers[i] != writers[j]:
                won = 0.5 * (1 + np.sign(label.ranks[j] - label.ranks[i]))
                wins.setdefault(writers[i], []).append(won)
                wins.setdefault(writers[j], []).append(1 - won)
    return found | {f"win_rate/{name}": float(np.mean(wins[each])) for name, each in policies.items() if each in wins}


def _agreement_with_gold(comparisons: Sequence[Comparison], data: DataSource) -> dict[str, float]:
    shares = []
    for comparison in comparisons:
        golds = [data.gold(comparison.prompt, text) for text in comparison.completions]
        found = [gold["gold"] for gold in golds if gold is not None]
        if len(found) == len(golds):
            shares.append(numerics.agreement(-np.array(comparison.ranks), np.array(found)))
    known = [share for share in shares if share is not None]
    return {"agreement/gold": float(np.mean(known))} if known else {}


def _agreement_of_labelers(labels: Sequence[Label]) -> dict[str, float]:
    """The mean over ordered pairs of labels of the same candidates: of the completion pairs that the first label orders, the
    share that the second orders alike. Ties in the second count half."""
    by_id: dict[str, list[Label]] = {}
    for label in labels:
        by_id.setdefault(label.id, []).append(label)
    shares = [
        numerics.agreement(-np.array(b.ranks), -np.array(a.ranks))
        for group in by_id.values() for a in group for b in group if a is not b
    ]  # fmt: skip
    known = [share for share in shares if share is not None]
    return {"agreement/labelers": float(np.mean(known))} if known else {}
