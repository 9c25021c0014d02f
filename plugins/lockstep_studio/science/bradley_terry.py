"""Strengths of players (policies) from pairwise preferences, by maximum likelihood: Bradley & Terry 1952 with Davidson's ties.

With d = s_i − s_j + β·x, the advantage of i over j in log-odds (Davidson 1970, "On Extending the Bradley-Terry Model to
Accommodate Ties in Paired Comparison Experiments"):

    P(i wins) : P(tie) : P(j wins)  =  exp(d/2) : ν : exp(−d/2)

So s_i − s_j is the log-odds that i wins if there is no tie. Ties are an outcome with a parameter of its own. Counting a tie as
half a win each would not be a likelihood: every tie would carry the information of a coin flip, so intervals would be too wide.
Without ties ν is 0, and this is the model of Bradley and Terry.

The covariates x, each with a coefficient of its own: ``side`` is +1 if i was shown first, −1 if j was (Davidson & Beaver 1977,
with the effect of the order on the log scale). ``length`` is the log of i's length over j's, so strengths are those at equal
lengths (as in Dubois et al. 2024, arXiv 2404.04475).

Intervals are value ± 1.96 standard errors. The covariance is the inverse of the observed information H, or, clustered by labeler,
H⁻¹ (Σ_g u_g u_gᵀ) H⁻¹ · G/(G − 1), where u_g is the sum of the scores of labeler g (Liang & Zeger 1986; White 1982). Clustered
intervals hold for any dependence among the games of one labeler, but with fewer than about 40 labelers they are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lockstep.errors import DataError, did_you_mean, listing, short
from lockstep_studio.science.agreement import Interval

COVARIATES = ("side", "length")
NORMAL = 1.959963984540054
"""The 97.5% point of the standard normal distribution."""
FARTHEST = 30.0
"""Log-odds beyond which an estimate counts as diverging: finite data cannot tell them from infinity."""


@dataclass(frozen=True)
class Game:
    """One comparison: ``outcome`` is 1 if ``first`` won, 0 for a tie, −1 if ``second`` won."""

    first: str
    second: str
    outcome: int
    side: int = 0
    length: float = 0.0
    labeler: str | None = None


@dataclass(frozen=True)
class Fit:
    """The estimates. ``theta``, float [P], has the strengths of ``players`` except the first, which is the reference at 0; then
    the coefficients of ``covariates``, where 'tie' is log ν. ``information`` is float [P, P], ``scores`` float [labelers, P]."""

    players: tuple[str, ...]
    covariates: tuple[str, ...]
    theta: np.ndarray
    information: np.ndarray
    scores: np.ndarray
    log_likelihood: float
    games: int

    def covariance(self, clustered: bool = False) -> np.ndarray:
        """The covariance of the estimates, float [P, P].

        Raises:
          DataError: ``clustered`` with fewer than two labelers.
        """
        inverse = np.linalg.inv(self.information)
        if not clustered:
            return inverse
        if (groups := len(self.scores)) < 2:
            raise DataError(f"Intervals clustered by labeler need two labelers or more; these games have {groups}.")
        return inverse @ (self.scores.T @ self.scores) @ inverse * groups / (groups - 1)

    def strengths(self, clustered: bool = False) -> dict[str, Interval]:
        """The strengths of all players relative to the reference, whose interval has no width."""
        reference, *others = self.players
        return {reference: Interval(0.0, 0.0, 0.0)} | dict(zip(others, self._intervals(clustered), strict=False))

    def effects(self, clustered: bool = False) -> dict[str, Interval]:
        """The coefficients of the covariates."""
        return dict(zip(self.covariates, self._intervals(clustered)[len(self.players) - 1 :], strict=True))

    def _intervals(self, clustered: bool) -> list[Interval]:
        errors = np.sqrt(np.diag(self.covariance(clustered)))
        return [Interval(float(t), float(t - NORMAL * e), float(t + NORMAL * e)) for t, e in zip(self.theta, errors, strict=True)]


def games(comparisons: Iterable[Mapping[str, Any]]) -> Iterator[Game]:
    """The games of a round's ``comparisons.jsonl``: one for each pair of completions by two policies. The games of one ranking
    depend on each other, so use clustered intervals. Lengths are in characters."""
    for row in comparisons:
        policies, ranks = row.get("policies") or (), row["ranks"]
        place = {index: i for i, index in enumerate(row.get("shown") or ())}
        for a, b in combinations(range(len(policies)), 2):
            if policies[a] != policies[b]:
                side = int(np.sign(place[b] - place[a])) if a in place and b in place else 0
                length = math.log(max(len(row["completions"][a]), 1) / max(len(row["completions"][b]), 1))
                outcome = int(np.sign(ranks[b] - ranks[a]))
                yield Game(policies[a], policies[b], outcome, side, length, row.get("labeler"))


def fit(played: Iterable[Game], reference: str | None = None, covariates: Sequence[str] = ()) -> Fit:
    """Estimate the strengths.

    Args:
      reference: the player at 0; None: the first by name.
      covariates: names from `COVARIATES`. 'tie' is added if there are ties.

    Raises:
      DataError: an argument is invalid, or no finite strengths explain the games best: all games are ties, some players never
        lost to or tied with the others (Ford 1957), or a covariate decides the games.
    """
    played = list(played)
    players = sorted({name for game in played for name in (game.first, game.second)})
    _check(played, players, reference, covariates)
    reference = players[0] if reference is None else reference
    players = [reference, *(name for name in players if name != reference)]
    design, outcome = _design(played, players, covariates), np.array([game.outcome for game in played])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise DataError(
            f"The games cannot tell {listing(covariates)} from the players: it is 0 in all of them, or one player always has it. "
            "Leave it out, or collect comparisons in which it varies."
        )
    ties = bool((outcome == 0).any())
    theta = _newton(design, outcome, ties)
    names = (*covariates, "tie") if ties else tuple(covariates)
    value, gradient, information = _derivatives(theta, design, outcome, ties)
    labelers, index = np.unique([game.labeler or "" for game in played], return_inverse=True)
    scores = np.stack([np.bincount(index, column, len(labelers)) for column in gradient.T], axis=1)
    return Fit(tuple(players), names, theta, information, scores, value, len(played))


def _design(played: Sequence[Game], players: Sequence[str], covariates: Sequence[str]) -> np.ndarray:
    """The matrix of d as a linear function of strengths and coefficients: float [games, P without 'tie']."""
    place, rows = {name: i for i, name in enumerate(players)}, np.arange(len(played))
    design = np.zeros((len(played), len(players)))
    design[rows, [place[game.first] for game in played]] = 1
    design[rows, [place[game.second] for game in played]] -= 1
    more = [[getattr(game, name) for game in played] for name in covariates]
    return np.concatenate([design[:, 1:], np.array(more, np.float64).reshape(len(more), len(played)).T], axis=1)


def _newton(design: np.ndarray, outcome: np.ndarray, ties: bool) -> np.ndarray:
    """The maximum of the log-likelihood, which is concave, by Newton steps that are halved while they overshoot.

    Raises:
      DataError: the maximum lies at infinity.
    """
    theta = np.zeros(design.shape[1] + ties)
    value, gradient, information = _derivatives(theta, design, outcome, ties)
    for _ in range(100):
        slope = gradient.sum(axis=0)
        step = np.linalg.lstsq(information, slope, rcond=None)[0]
        if np.abs(step).max(initial=0) < 1e-10:
            return theta
        if np.abs(theta).max() > FARTHEST:
            break
        while (found := _derivatives(theta + step, design, outcome, ties))[0] < value - 1e-9 * abs(value):
            step = step / 2
        theta, (value, gradient, information) = theta + step, found
    raise DataError(
        "No finite estimates explain the games best: the side shown first or the length decides all that the players do not. "
        "Leave out one of the covariates, or collect more comparisons."
    )


def _derivatives(theta: np.ndarray, design: np.ndarray, outcome: np.ndarray, ties: bool) -> tuple[float, np.ndarray, np.ndarray]:
    """The log-likelihood, its gradient for each game [games, P], and minus its second derivatives [P, P]."""
    d = design @ theta[: design.shape[1]]
    logits = np.stack([d / 2, np.full(len(d), theta[-1] if ties else -np.inf), -d / 2])
    logits = logits - np.logaddexp.reduce(logits, axis=0)
    win, tie, loss = np.exp(logits)
    likelihood = logits[1 - outcome, np.arange(len(d))].sum()
    mean = win - loss
    gradient = design * ((outcome - mean) / 2)[:, None]
    information = design.T @ (design * ((win + loss - mean**2) / 4)[:, None])
    if ties:
        gradient = np.concatenate([gradient, ((outcome == 0) - tie)[:, None]], axis=1)
        across = design.T @ (-mean * tie / 2)
        corner = (tie * (1 - tie)).sum()
        information = np.block([[information, across[:, None]], [across[None, :], corner]])
    return float(likelihood), gradient, information


# -------------------------------------------------------------------------------------------------------------- checks


def _check(played: Sequence[Game], players: Sequence[str], reference: str | None, covariates: Sequence[str]) -> None:
    if wrong := [name for name in covariates if name not in COVARIATES]:
        raise DataError(
            f"No covariate '{short(wrong[0])}'.{did_you_mean(wrong[0], COVARIATES)} There are: {listing(COVARIATES)}."
        )
    if len(players) < 2:
        raise DataError("Strengths need games between two players or more; no row has completions by two policies.")
    if reference is not None and reference not in players:
        raise DataError(
            f"No game has the player '{short(reference)}'.{did_you_mean(reference, players)} Players: {listing(players)}."
        )
    if wrong_game := next((game for game in played if game.first == game.second or game.outcome not in (-1, 0, 1)), None):
        raise DataError(f"A game needs two players and an outcome of 1, 0 or -1, not {wrong_game}.")
    if not any(game.outcome for game in played):
        raise DataError("All games are ties, so nothing tells the players apart. Collect more comparisons.")
    if above := _unbeaten(played, players):
        below = [name for name in players if name not in above]
        raise DataError(
            f"No finite strengths: {listing(above)} never lost to, nor tied with, {listing(below)}. Collect more comparisons "
            "between them, or leave out one side."
        )


def _unbeaten(played: Sequence[Game], players: Sequence[str]) -> list[str]:
    """Players that none of the rest beat or tied with, even through others; empty if each player reaches each (Ford 1957)."""
    place = {name: i for i, name in enumerate(players)}
    reaches: list[set[int]] = [set() for _ in players]  # i reaches those it won against or tied with
    for game in played:
        first, second = place[game.first], place[game.second]
        if game.outcome >= 0:
            reaches[first].add(second)
        if game.outcome <= 0:
            reaches[second].add(first)
    back: list[set[int]] = [{i for i, found in enumerate(reaches) if j in found} for j in range(len(players))]
    if len(_reached(reaches, 0)) < len(players):  # 0 never beat the rest, even through others
        return [name for i, name in enumerate(players) if i not in _reached(reaches, 0)]
    above = _reached(back, 0)
    return [] if len(above) == len(players) else [name for i, name in enumerate(players) if i in above]


def _reached(edges: Sequence[set[int]], start: int) -> set[int]:
    found, new = {start}, [start]
    while new:
        fresh = edges[new.pop()] - found
        found |= fresh
        new += fresh
    return found
