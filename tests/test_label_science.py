"""What labels tell: agreement against the krippendorff package and published examples, Bradley-Terry against Agresti's baseball
and simulations, screening by hand."""

from __future__ import annotations

import itertools
import math
import time

import krippendorff as theirs
import numpy as np
import pytest

from lockstep.errors import DataError
from lockstep_studio.science import agreement, bradley_terry, rankings, screening
from lockstep_studio.science.agreement import Interval, Labels
from lockstep_studio.science.bradley_terry import Game
from lockstep_studio.science.screening import Share

NAN = math.nan
LEVELS = ("nominal", "ordinal", "interval")

EXAMPLE = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
])  # fmt: skip
"""Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units."""

TWO = (np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15]))
"""Fifty items: both say 0 of 20 and 1 of 15, and differ on 5 and 10."""


def random_labels(seed: int, missing: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(2, 6), size=(rng.integers(2, 6), rng.integers(3, 20))).astype(float)
    labels[rng.random(labels.shape) < missing] = NAN
    return labels


# ----------------------------------------------------------------------------------------------------------- agreement


def test_alpha_is_krippendorffs_own_on_his_example():
    found = [round(agreement.krippendorff(EXAMPLE, level), 3) for level in LEVELS]
    assert found == [0.743, 0.815, 0.849]


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_that_of_the_krippendorff_package_with_values_missing(level):
    compared = 0
    for seed in range(200):
        labels = random_labels(seed)
        ours = agreement.krippendorff(labels, level)
        if math.isnan(ours):
            continue
        assert ours == pytest.approx(theirs.alpha(labels, level_of_measurement=level), abs=1e-12)
        compared += 1
    assert compared > 150


def test_raw_agreement_is_the_share_of_pairs_of_labels_that_are_equal():
    pairs = [
        (a, b)
        for column in EXAMPLE.T
        for a, b in itertools.combinations(column[~np.isnan(column)], 2)
    ]  # fmt: skip
    assert agreement.raw(EXAMPLE) == np.mean([a == b for a, b in pairs])
    assert agreement.raw(np.array([[1, 1, 2], [1, 2, NAN], [1, 2, 2]])) == 5 / 7  # 3 of 3, 1 of 3, 1 of 1


def test_cohens_kappa_by_hand():
    """Observed 35/50; by chance (25·30 + 25·20)/2500 = 1/2; κ = (0.7 − 0.5)/0.5."""
    assert agreement.cohen(*TWO) == pytest.approx(0.4, abs=1e-12)


def test_weighted_kappas_by_hand():
    """1 and 2, 2 and 2, 3 and 1. Observed: 1 + 0 + 2, squared 1 + 0 + 4, over 3. By chance over the nine pairs of {1, 2, 3} and
    {2, 2, 1}: |differences| 1+1+0 + 0+0+1 + 1+1+2 = 7, squared 1+1+0 + 0+0+1 + 1+1+4 = 9."""
    first, second = np.array([1, 2, 3]), np.array([2, 2, 1])
    assert agreement.cohen(first, second, "linear") == pytest.approx(1 - (3 / 3) / (7 / 9), abs=1e-12)
    assert agreement.cohen(first, second, "quadratic") == pytest.approx(1 - (5 / 3) / (9 / 9), abs=1e-12)


@pytest.mark.parametrize("weighting", ["none", "linear", "quadratic"])
def test_congers_kappa_of_complete_labels_sums_cohens_over_all_pairs(weighting):
    labels = np.random.default_rng(3).integers(1, 5, size=(4, 30)).astype(float)
    cost = {"none": lambda a, b: a != b, "linear": lambda a, b: abs(a - b), "quadratic": lambda a, b: (a - b) ** 2}[weighting]
    observed = chance = 0.0
    for a, b in itertools.combinations(labels, 2):
        observed += np.mean([cost(x, y) for x, y in zip(a, b, strict=True)])
        chance += np.mean([cost(x, y) for x in a for y in b])
    assert agreement.conger(labels, weighting) == pytest.approx(1 - observed / chance, abs=1e-12)


def test_items_that_one_labeler_alone_labeled_do_not_count():
    shared = np.array([[1.0, 1, 1, 2], [1, 2, 2, 2]])
    alone = np.array([[NAN, NAN, 1], [1, 1, NAN]])
    both = np.concatenate([shared, alone], axis=1)
    for measure in (agreement.raw, agreement.conger, agreement.krippendorff):
        assert measure(both) == measure(shared)


def test_labelers_who_guess_agree_by_chance_only_although_each_pair_shares_few_items():
    rng = np.random.default_rng(0)
    labels = np.full((60, 3000), NAN)
    for item in range(3000):
        labels[rng.choice(60, 2, replace=False), item] = rng.random(2) < 0.8
    assert agreement.raw(labels) == pytest.approx(0.68, abs=0.03)
    assert abs(agreement.conger(labels)) < 0.06
    assert abs(agreement.krippendorff(labels)) < 0.06


@pytest.mark.parametrize(
    "labels",
    [[[NAN, NAN], [NAN, NAN]], [[1.0, 2.0]], [[1, NAN], [NAN, 2]]],
    ids=["no label", "one labeler", "no shared item"],
)
def test_without_two_labels_of_one_item_nothing_can_be_told(labels):
    labels = np.array(labels)
    assert math.isnan(agreement.raw(labels))
    assert math.isnan(agreement.conger(labels))
    assert math.isnan(agreement.krippendorff(labels))
    assert math.isnan(agreement.measure(Labels.of(labels), "nominal", "none")["raw"].value)


def test_without_variation_agreement_is_complete_and_kappa_and_alpha_unknown():
    labels = np.ones((3, 4))
    assert agreement.raw(labels) == 1
    assert math.isnan(agreement.conger(labels)) and math.isnan(agreement.krippendorff(labels, "interval"))


def test_labels_of_another_form_are_refused():
    with pytest.raises(DataError, match=r"\[labelers, items\]"):
        agreement.raw(np.ones(3))
    with pytest.raises(DataError, match="finite"):
        agreement.raw(np.array([[1.0, math.inf], [1, 1]]))


def test_the_interval_is_that_of_all_resamples_of_items():
    """Of four items there are 256 resamples, all equally likely."""
    labels = np.array([[1.0, 1, 2, 2], [1, 2, 2, 2], [1, 1, 1, 2]])
    every = [labels[:, list(items)] for items in itertools.product(range(4), repeat=4)]
    found = agreement.measure(Labels.of(labels), "nominal", "none", draws=20_000)
    for name, measure in (("raw", agreement.raw), ("kappa", agreement.conger), ("alpha", agreement.krippendorff)):
        values = np.array([measure(each) for each in every])
        exact = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
        assert [found[name].low, found[name].high] == pytest.approx(exact, abs=0.02), name
        assert found[name].value == measure(labels)


def test_intervals_are_the_same_for_the_same_seed_and_unknown_without_draws_or_for_one_item():
    labels = Labels.of(EXAMPLE)
    found = agreement.measure(labels, "ordinal", "none", seed=4)
    assert found == agreement.measure(labels, "ordinal", "none", seed=4)
    assert found != agreement.measure(labels, "ordinal", "none", seed=5)
    assert math.isnan(agreement.measure(labels, "ordinal", "none", draws=0)["raw"].low)
    assert math.isnan(agreement.measure(Labels.of(np.array([[1.0], [2]])), "nominal", "none")["raw"].low)


def test_nine_of_ten_intervals_and_more_hold_the_truth():
    """Two labelers agree with probability 0.7 on each of 80 items."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(200):
        first = rng.integers(0, 2, 80)
        second = np.where(rng.random(80) < 0.7, first, 1 - first)
        found = agreement.measure(Labels.of(np.stack([first, second])), "nominal", "none", draws=400)["raw"]
        held += found.low <= 0.7 <= found.high
    assert held / 200 > 0.9


# ------------------------------------------------------------------------------------------------------ labels of a round


def vote(task, labeler, ranks, group="training", **more):
    return {"id": task, "labeler": labeler, "group": group, "ranks": ranks, **more}


def test_preferences_are_compared_pair_by_pair():
    """a > b > c against a > c > b agree on two pairs of three; a = b > c and a > b = c agree on one."""
    rows = [vote("1", "x", [0, 1, 2]), vote("1", "y", [0, 2, 1]), vote("2", "x", [0, 0, 1]), vote("2", "y", [0, 1, 1])]
    found = rankings.by_group(rows, draws=0)["training"]
    assert found["raw"].value == 3 / 6
    assert found["items"] == 2


def test_agreement_on_preferences_does_not_depend_on_the_order_of_completions():
    rng = np.random.default_rng(1)
    rows = [vote(str(task), name, list(rng.integers(0, 3, 4))) for task in range(40) for name in "xyz"]
    orders = {str(task): rng.permutation(4) for task in range(40)}
    shuffled = [{**row, "ranks": [row["ranks"][i] for i in orders[row["id"]]]} for row in rows]
    for what in (rankings.by_group, rankings.by_pair):
        ours, others = what(rows), what(shuffled)
        for key, found in ours.items():
            for name in ("raw", "kappa", "alpha"):
                one, other = (getattr(each, "value", each) for each in (found[name], others[key][name]))
                assert one == pytest.approx(other, abs=1e-12)


def test_alpha_of_preferences_is_the_packages_where_each_pair_stands_in_both_orders():
    """But for the correction n − 1, which is of the labels that were given."""
    rng = np.random.default_rng(2)
    ranks = rng.integers(0, 2, size=(3, 50, 2))
    rows = [vote(str(task), str(labeler), list(ranks[labeler, task])) for labeler in range(3) for task in range(50)]
    signs = np.sign(ranks[..., 1] - ranks[..., 0]).astype(float)
    both = theirs.alpha(np.concatenate([signs, -signs], axis=1), level_of_measurement="ordinal")
    n = signs.size
    assert rankings.by_group(rows)["training"]["alpha"].value == pytest.approx(1 - (1 - both) * (n - 1) / (n - 0.5), abs=1e-12)


def test_ratings_are_ordinal_and_missing_ones_do_not_count():
    ratings = np.array([[5, 3, NAN, 7], [4, 3, 2, 7], [5, NAN, 1, 6]])
    rows = [
        vote("1", name, [0, 1], ratings=[None if np.isnan(r) else int(r) for r in own[:2]])
        for name, own in zip("abc", ratings, strict=True)
    ] + [
        vote("2", name, [0, 1], ratings=[None if np.isnan(r) else int(r) for r in own[2:]])
        for name, own in zip("abc", ratings, strict=True)
    ]
    rows.append(vote("3", "a", [0, 1], ratings=None))
    found = rankings.by_group(rows, "ratings", draws=0)["training"]
    assert found["alpha"].value == pytest.approx(theirs.alpha(ratings, level_of_measurement="ordinal"), abs=1e-12)
    assert found["kappa"].value == pytest.approx(agreement.conger(ratings, "quadratic"), abs=1e-12)
    assert found["items"] == 2


def test_each_flag_is_nominal():
    """Of six completions x flags 1, 2, 3 and y flags 1, 2, 4."""
    flags = {"x": [["rude"], ["rude"], ["rude"], [], [], ["long"]], "y": [["rude"], ["rude"], [], ["rude"], [], []]}
    rows = [vote(str(task), name, [0, 0], flags=own[2 * task : 2 * task + 2]) for name, own in flags.items() for task in range(3)]
    rows.append(vote("0", "z", [0, 0], flags=None))
    table = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]], float)
    found = rankings.by_group(rows, "rude", draws=0)["training"]
    assert found["raw"].value == 4 / 6
    assert found["kappa"].value == pytest.approx(1 - (2 / 6) / (1 / 2), abs=1e-12)  # half of either are flagged
    assert found["alpha"].value == pytest.approx(theirs.alpha(table, level_of_measurement="nominal"), abs=1e-12)
    assert rankings.flag_names(rows) == ["long", "rude"]
    with pytest.raises(DataError, match=r"no completion|No completion has the flag 'rud'\. Did you mean 'rude'\?"):
        rankings.by_group(rows, "rud")


def test_groups_are_apart_and_a_revised_label_counts_once():
    rows = [
        vote("1", "a", [0, 1]), vote("1", "a", [1, 0]), vote("1", "b", [1, 0]),
        vote("1", "c", [0, 1], "expert"), vote("1", "d", [1, 0], "expert"), vote("1", "e", [0, 1], None),
    ]  # fmt: skip
    found = rankings.by_group(rows, draws=0)
    assert {group: each["raw"].value for group, each in found.items() if group} == {"training": 1.0, "expert": 0.0}
    assert math.isnan(found[""]["raw"].value) and found[""]["items"] == 0


def test_pairs_of_labelers_have_cohens_kappa_on_what_both_labeled():
    rows = [vote(str(i), "p", [0, 1], flags=[["f"] if a else [], []]) for i, a in enumerate(TWO[0])]
    rows += [vote(str(i), "q", [0, 1], flags=[["f"] if b else [], []]) for i, b in enumerate(TWO[1])]
    rows += [vote("77", "q", [0, 1], flags=[["f"], ["f"]])]
    found = rankings.by_pair(rows, "f")
    assert list(found) == [("p", "q")]
    table = np.array([[x, 0] for x in TWO[0]]).ravel(), np.array([[x, 0] for x in TWO[1]]).ravel()
    assert found["p", "q"]["kappa"] == pytest.approx(agreement.cohen(*table), abs=1e-12)
    assert found["p", "q"]["alpha"] == pytest.approx(theirs.alpha(np.stack(table), level_of_measurement="nominal"), abs=1e-12)
    assert found["p", "q"]["units"] == 100 and found["p", "q"]["raw"] == 0.85


def test_completions_of_one_ranking_are_resampled_together():
    """Copies of one completion tell no more: with pairs resampled, the interval of 9 copies would be far narrower."""
    rng = np.random.default_rng(7)
    few = [vote(str(t), name, list(rng.permutation(2)), ratings=None) for t in range(60) for name in "xy"]
    many = [{**row, "ranks": [row["ranks"][0]] * 5 + [row["ranks"][1]] * 5} for row in few]
    narrow, wide = (rankings.by_group(rows)["training"]["raw"] for rows in (many, few))
    assert (narrow.high - narrow.low) > 0.5 * (wide.high - wide.low)


def test_rows_of_one_task_with_different_numbers_of_completions_are_refused():
    with pytest.raises(DataError, match="Task '1' has 2 completions in one row and 3 in another"):
        rankings.by_group([vote("1", "a", [0, 1]), vote("1", "b", [0, 1, 2])])


def test_ten_thousand_labels_take_a_moment():
    rng = np.random.default_rng(0)
    rows = [
        vote(str(i // 3), f"l{rng.integers(40)}", list(rng.integers(0, 3, 4)), ratings=list(map(int, rng.integers(1, 8, 4))))
        for i in range(10_000)
    ]
    start = time.process_time()
    rankings.by_group(rows, draws=0)
    plain = time.process_time() - start
    rankings.by_group(rows, "ratings")
    assert plain < 1
    assert time.process_time() - start < 8


# -------------------------------------------------------------------------------------------------------- Bradley-Terry

TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
HOME = (
    ((4, 3), (4, 2), (4, 3), (6, 1), (4, 2), (6, 0)), ((3, 3), (4, 2), (4, 3), (6, 0), (6, 1), (4, 3)),
    ((2, 5), (4, 3), (2, 4), (4, 3), (4, 2), (6, 0)), ((3, 3), (5, 1), (2, 5), (4, 3), (4, 2), (6, 1)),
    ((5, 1), (2, 5), (3, 3), (4, 2), (5, 2), (6, 0)), ((2, 5), (3, 3), (3, 4), (4, 3), (4, 2), (2, 4)),
    ((2, 5), (1, 5), (1, 6), (2, 4), (1, 6), (3, 4)),
)  # fmt: skip
"""Agresti 2002, "Categorical Data Analysis", section 10.6: games of the American League's East in 1987, (won, lost) at home
against each other team in the order of TEAMS. The estimates and standard errors are those of R's BradleyTerry2
(tests/baseball.Rout.save)."""


def baseball() -> list[Game]:
    found = []
    for home, results in zip(TEAMS, HOME, strict=True):
        away = [team for team in TEAMS if team != home]
        for other, (won, lost) in zip(away, results, strict=True):
            found += [Game(home, other, 1, side=1)] * won + [Game(home, other, -1, side=1)] * lost
    return found


def error(interval: Interval) -> float:
    return (interval.high - interval.low) / (2 * 1.959964)


@pytest.mark.parametrize(
    ("covariates", "published"),
    [
        ((),
        {"Boston": (1.1077, 0.3339), "Cleveland": (0.6839, 0.3319), "Detroit": (1.4364, 0.3396), "Milwaukee": (1.5814, 0.3433),
              "New York": (1.2476, 0.3359), "Toronto": (1.2945, 0.3367)}),
        (("side",), {"Boston": (1.1438, 0.3378), "Cleveland": (0.7047, 0.3350), "Detroit": (1.4754, 0.3446),
                     "Milwaukee": (1.6196, 0.3474), "New York": (1.2813, 0.3404), "Toronto": (1.3271, 0.3403),
                     "side": (0.3023, 0.1309)}),
    ],
    ids=["plain", "at home"],
)  # fmt: skip
def test_strengths_are_those_published_of_agrestis_baseball(covariates, published):
    found = bradley_terry.fit(baseball(), "Baltimore", covariates)
    assert found.games == 273
    estimates = found.strengths() | found.effects()
    assert estimates["Baltimore"] == Interval(0, 0, 0)
    for name, (value, standard_error) in published.items():
        assert estimates[name].value == pytest.approx(value, abs=6e-5), name
        assert error(estimates[name]) == pytest.approx(standard_error, abs=2e-4), name


def test_two_players_with_ties_by_hand():
    """Davidson's model of two players has as many parameters as outcomes: it says the observed shares. Of 30 wins, 20 ties and 10
    losses the strength is log 3, ν = 20/√300, and the delta method gives the variances 1/30 + 1/10 and 1/20 + (1/30 + 1/10)/4."""
    played = [Game("a", "b", 1)] * 30 + [Game("a", "b", 0)] * 20 + [Game("a", "b", -1)] * 10
    found = bradley_terry.fit(played, "b")
    assert found.strengths()["a"].value == pytest.approx(math.log(3), abs=1e-9)
    assert found.effects()["tie"].value == pytest.approx(math.log(20 / math.sqrt(300)), abs=1e-9)
    assert error(found.strengths()["a"]) == pytest.approx(math.sqrt(1 / 30 + 1 / 10), rel=1e-5)
    assert error(found.effects()["tie"]) == pytest.approx(math.sqrt(1 / 20 + (1 / 30 + 1 / 10) / 4), rel=1e-5)


def drawn(rng, count, strengths, nu=0.5, side=0.3, length=0.4, labelers=20, copies=1) -> list[Game]:
    """Games of Davidson's model, each of them ``copies`` times by its labeler."""
    names = [f"p{i}" for i in range(len(strengths))]
    first = rng.integers(len(strengths), size=count)
    second = (first + rng.integers(1, len(strengths), size=count)) % len(strengths)
    sides, lengths = rng.choice([-1, 1], count), rng.normal(size=count)
    d = strengths[first] - strengths[second] + side * sides + length * lengths
    weights = np.stack([np.exp(d / 2), np.full(count, nu), np.exp(-d / 2)])
    outcome = 1 - (rng.random(count) > np.cumsum(weights / weights.sum(axis=0), axis=0)[:2]).sum(axis=0)
    rows = zip(first, second, outcome, sides, lengths, strict=True)
    return [
        Game(names[a], names[b], int(o), int(s), float(x), f"l{k % labelers}")
        for k, (a, b, o, s, x) in enumerate(rows)
        for _ in range(copies)
    ]


STRENGTHS = np.array([0.0, 0.5, 1.0, -0.4])
TRUTH = {"p1": 0.5, "p2": 1.0, "p3": -0.4, "side": 0.3, "length": 0.4, "tie": math.log(0.5)}


def log_likelihood(theta, played) -> float:
    """Of games with ties, both covariates and players in the order of their names, from the model's definition."""
    players = sorted({name for game in played for name in (game.first, game.second)})
    strengths = dict(zip(players, [0.0, *theta], strict=False))
    side, length, tie = theta[len(players) - 1 :]
    total = 0.0
    for game in played:
        d = strengths[game.first] - strengths[game.second] + side * game.side + length * game.length
        weights = {1: math.exp(d / 2), 0: math.exp(tie), -1: math.exp(-d / 2)}
        total += math.log(weights[game.outcome] / sum(weights.values()))
    return total


def test_the_likelihood_is_flat_at_the_estimate_and_curves_as_the_information_says():
    played = drawn(np.random.default_rng(0), 300, STRENGTHS)
    found = bradley_terry.fit(played, covariates=("side", "length"))
    assert found.log_likelihood == pytest.approx(log_likelihood(found.theta, played), rel=1e-12)
    step = 1e-4 * np.eye(len(found.theta))
    for i, e in enumerate(step):
        up, down = log_likelihood(found.theta + e, played), log_likelihood(found.theta - e, played)
        assert (up - down) / 2e-4 == pytest.approx(0, abs=1e-4)
        for j, f in enumerate(step):
            corners = [log_likelihood(found.theta + s * e + t * f, played) * s * t for s in (1, -1) for t in (1, -1)]
            assert -sum(corners) / 4e-8 == pytest.approx(found.information[i, j], abs=1e-2)
    assert found.scores.sum(axis=0) == pytest.approx(np.zeros(6), abs=1e-8)


def test_no_point_of_a_grid_around_the_estimate_is_likelier():
    played = drawn(np.random.default_rng(1), 60, np.array([0.0, 0.7]))
    best = bradley_terry.fit(played, covariates=("side", "length"))
    grid = itertools.product(np.linspace(-0.3, 0.3, 5), repeat=4)
    assert max(log_likelihood(best.theta + np.array(offset), played) for offset in grid) <= best.log_likelihood + 1e-9


def coverage(clustered: bool, simulations: int = 400, copies: int = 1) -> dict[str, float]:
    held = dict.fromkeys(TRUTH, 0)
    for seed in range(simulations):
        played = drawn(np.random.default_rng(1000 + seed), 400, STRENGTHS, labelers=50, copies=copies)
        found = bradley_terry.fit(played, "p0", ("side", "length"))
        estimates = found.strengths(clustered) | found.effects(clustered)
        for name, true in TRUTH.items():
            held[name] += estimates[name].low <= true <= estimates[name].high
    return {name: count / simulations for name, count in held.items()}


def test_95_of_100_intervals_hold_the_truth():
    found = coverage(clustered=False)
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


def test_clustered_intervals_hold_the_truth_where_labelers_repeat_themselves_and_plain_ones_do_not():
    plain, clustered = (coverage(clustered, simulations=250, copies=4) for clustered in (False, True))
    assert all(0.92 <= share <= 0.98 for share in clustered.values()), clustered
    assert all(share < 0.8 for share in plain.values()), plain


@pytest.mark.parametrize(
    ("played", "said"),
    [
        ([Game("a", "b", 1)] * 9 + [Game("b", "c", 1), Game("c", "b", 1)], "a never lost to, nor tied with, b, c"),
        ([Game("b", "a", -1), Game("b", "c", -1), Game("a", "c", 0)], "a, c never lost to, nor tied with, b"),
        ([Game("a", "b", 1), Game("b", "a", 1), Game("c", "d", 1), Game("d", "c", 1)], "never lost to"),
        ([Game("a", "b", 0)] * 3, "All games are ties"),
        ([Game("a", "b", 1, side=1), Game("b", "a", 1, side=1), Game("a", "b", -1, side=-1)] * 5, "the side shown first"),
        ([Game("a", "b", 1), Game("b", "a", 1)], "cannot tell side from the players"),
        ([], "two players or more"),
        ([Game("a", "a", 1), Game("a", "b", 1)], "two players and an outcome"),
    ],
)  # fmt: skip
def test_what_has_no_finite_strengths_is_an_error_that_says_why(played, said):
    with pytest.raises(DataError, match=said):
        bradley_terry.fit(played, covariates=("side",))


def test_unknown_players_and_covariates_are_named():
    with pytest.raises(DataError, match=r"No game has the player 'Bostn'\. Did you mean 'Boston'\?"):
        bradley_terry.fit(baseball(), "Bostn")
    with pytest.raises(DataError, match=r"No covariate 'sid'\. Did you mean 'side'\?"):
        bradley_terry.fit(baseball(), covariates=("sid",))
    with pytest.raises(DataError, match="two labelers or more; these games have 1"):
        bradley_terry.fit(baseball()).strengths(clustered=True)


def test_a_ranking_is_a_game_for_each_pair_of_policies_with_side_and_length():
    row = {"policies": ["p", "q", "p"], "ranks": [0, 1, 1], "shown": [2, 1, 0], "completions": ["aa", "aaaa", ""], "labeler": "x"}
    found = list(bradley_terry.games([row, {**row, "policies": None}]))
    assert found == [Game("p", "q", 1, -1, math.log(0.5), "x"), Game("q", "p", 0, -1, math.log(4), "x")]


# ------------------------------------------------------------------------------------------------------------ screening


def test_wilsons_interval_by_hand():
    """9 of 10: (0.9 + 0.19207 ± 1.95996 √(0.009 + 0.0096036)) / 1.38415; also the published [0.596, 0.982]."""
    found = Share.of(9, 10)
    assert (found.low, found.high) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert Share.of(0, 10).low == pytest.approx(0, abs=1e-12)
    assert Share.of(0, 10).high == pytest.approx(0.27753, abs=1e-5)  # z²/(n + z²)


def test_a_gold_item_is_right_if_no_true_order_is_turned_or_tied():
    assert screening.right([0, 1, 1], [0, 1, 1]) and screening.right([0, 1, 2], [0, 1, 1])
    assert not screening.right([0, 0, 1], [0, 1, 1]) and not screening.right([2, 0, 1], [0, 1, 1])


def test_labelers_below_the_minimum_for_sure_are_named_and_those_with_few_items_not():
    gold = {str(i): [0, 1] for i in range(20)}
    rows = [vote(str(i), "good", [0, 1]) for i in range(20)] + [vote(str(i), "bad", [1, 0]) for i in range(20)]
    rows += [vote("0", "new", [1, 0]), vote("other", "new", [1, 0])]
    shares = screening.gold(rows, gold)
    assert {name: (share.count, share.total) for name, share in shares.items()} == {
        "good": (20, 20),
        "bad": (0, 20),
        "new": (0, 1),
    }
    assert screening.below(shares, 0.7) == ["bad"]


def test_an_attention_check_is_passed_by_whoever_prefers_the_named_completion_alone():
    rows = [vote("c", "a", [1, 0, 1]), vote("c", "b", [0, 0, 1]), vote("c", "d", [0, 1, 1]), vote("x", "a", [0, 1, 1])]
    assert {name: share.count for name, share in screening.attention(rows, {"c": 1}).items()} == {"a": 1, "b": 0, "d": 0}


def test_a_hand_that_always_presses_one_key_shows():
    rows = [vote(str(i), "left", [i % 2, 1 - i % 2], shown=[i % 2, 1 - i % 2]) for i in range(10)]
    rows += [vote("10", "left", [0, 0], shown=[0, 1]), vote("11", "left", [0, 1, 2], shown=[0, 1, 2])]
    found = screening.sides(rows)["left"]
    assert (found.count, found.total) == (10, 10)


def test_rows_without_ratings_have_no_items_to_agree_on():
    rows = [{"id": "a", "labeler": who, "ranks": [0, 1], "ratings": None, "flags": None} for who in ("x", "y")]
    measured = rankings.by_group(rows, "ratings", draws=10)
    assert measured[""]["items"] == 0 and math.isnan(measured[""]["alpha"].value)
    assert rankings.by_group(rows, draws=10)[""]["items"] == 1
