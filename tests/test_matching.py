"""The matching: which responses comparisons cover, and what demonstrations and the gold score say of the others."""

from collections import Counter

import pytest

from lockstep.errors import ConfigError, DataError, MissingData
from lockstep_miniature.matching import Matching


def matching(**settings):
    return Matching(Matching.Config(**settings))


def said(prompt):
    return int(prompt.messages[-1].content.removeprefix("ask"))


def test_comparisons_hold_the_right_response_against_each_covered_one():
    source = matching(comparisons=500)
    seen = {prompt: set() for prompt in range(8)}
    for comparison in source.comparisons("train"):
        asked = said(comparison.prompt)
        assert comparison.completions[comparison.ranks.index(0)] == f"say{asked}"
        seen[asked] |= set(comparison.completions)
    assert all(len(responses) == 4 for responses in seen.values())
    assert len({frozenset(r) for r in seen.values()}) > 4  # which are covered differs between prompts
    for prompt in source.prompts("heldout")[:8]:
        for number in range(8):
            gold = source.gold(prompt, f"say{number}")
            assert gold["gold"] == (number == said(prompt))
            assert gold["uncovered"] == (f"say{number}" not in seen[said(prompt)])
            assert gold["other"] == 0
    assert source.gold(prompt, "ask1") == source.gold(prompt, "") == {"gold": 0, "uncovered": 0, "other": 1}


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_demonstrations_give_uncovered_responses_as_often_as_asked(share):
    source = matching(uncovered=share)
    demonstrations = source.demonstrations("train")
    golds = [source.gold(d.prompt, d.response) for d in demonstrations]
    uncovered, right = (sum(g[part] for g in golds) / len(golds) for part in ("uncovered", "gold"))
    assert uncovered == pytest.approx(share, abs=0.03)
    assert right == pytest.approx((1 - share) / 4, abs=0.03)
    assert len(Counter(d.response for d in demonstrations)) == 8


def test_seeds_cover_other_responses_and_items_do_not_depend_on_sizes():
    assert matching().covered != matching(seed=1).covered
    assert matching().demonstrations("train")[:50] == matching(demonstrations=50).demonstrations("train")[:]
    assert matching(covered=7, uncovered=0).gold(matching().prompts("train")[0], "say5")["uncovered"] == 0


def test_every_response_is_one_token():
    source = matching(size=12)
    tokenizer = source.tokenizer()
    for demonstration in source.demonstrations("heldout"):
        (token,) = tokenizer.encode(demonstration.response)
        assert tokenizer.decode([token]) == demonstration.response


def test_what_it_has_not_is_an_error():
    with pytest.raises(ConfigError, match="data.covered is 8, but of 8 responses only 7 are wrong"):
        matching(covered=8)
    with pytest.raises(ConfigError, match="so none is uncovered. Set data.uncovered=0"):
        matching(covered=7)
    with pytest.raises(DataError, match="The matching has no split 'adversarial' of prompts"):
        matching().prompts("adversarial")
    with pytest.raises(MissingData, match="start policies with SFT"):
        matching().texts("train")
