"""The miniature is deterministic, closed and honest about its truth; and it has the flaws that it claims to have."""

import re
from itertools import islice

import numpy as np
import pytest

from lockstep.config.schema import parse
from lockstep.errors import ConfigError, DataError
from lockstep.learning import numerics
from lockstep.types import Prompt
from lockstep_miniature import responses
from lockstep_miniature.dice import Dice
from lockstep_miniature.gold import MAX_GOLD
from lockstep_miniature.labelers import HELDOUT_LABELERS, TRAINING_LABELERS, labeler_agreement
from lockstep_miniature.source import Config, Miniature
from lockstep_miniature.tasks import FAMILIES, Task
from lockstep_miniature.world import CREATURES, RELATIONS

SIZES = dict(
    texts=600,
    demonstrations=600,
    comparisons=300,
    prompts=1500,
    heldout_texts=100,
    heldout_demonstrations=200,
    heldout_comparisons=200,
    heldout_prompts=400,
    adversarial_prompts=100,
    ability_items=198,
)
FIRST_DEMONSTRATION = ("what does wug eat ?", "gladly , wug eats leaves .")
SPLITS = ("train", "heldout", "adversarial")


@pytest.fixture(scope="module")
def world():
    return Miniature(Config(seed=0, **SIZES))


@pytest.fixture(scope="module")
def tokenizer(world):
    return world.tokenizer()


@pytest.fixture(scope="module")
def prompts(world):
    return {split: list(world.prompts(split)) for split in SPLITS}


@pytest.fixture(scope="module")
def by_family(prompts):
    """Some held-out prompts of every family, and adversarial ones."""
    families = {family: [] for family in (*FAMILIES, "adversarial")}
    for prompt in prompts["heldout"] + prompts["adversarial"]:
        families[prompt.truth["family"]].append(prompt)
    return {family: list(islice(found, 12)) for family, found in families.items()}


def mean_gold(world, prompts, write):
    return np.mean([world.gold(p, write(Task.of(p), Dice(7, "test", i)))["gold"] for i, p in enumerate(prompts)])


def constant_gold(world, by_family, response):
    """The mean over families, so that no family's frequency matters."""
    return np.mean([np.mean([world.gold(p, response)["gold"] for p in found]) for found in by_family.values()])


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_same_seed_draws_the_same_world_in_any_order(world):
    again = Miniature(Config(seed=0, **SIZES))
    assert again.texts("train")[599] == world.texts("train")[599]
    assert list(again.texts("train")) == list(world.texts("train"))
    assert list(again.demonstrations("heldout")) == list(world.demonstrations("heldout"))
    assert list(again.comparisons("train"))[:50] == world.comparisons("train")[:50]
    assert list(again.tests()["ability"]) == list(world.tests()["ability"])


def test_another_seed_is_another_world_of_other_facts(world):
    other = Miniature(Config(seed=1, **SIZES))
    assert other.world.facts != world.world.facts
    assert list(other.texts("train")) != list(world.texts("train"))


def test_the_first_demonstration_of_seed_zero_stays_what_it_is(world):
    first = world.demonstrations("train")[0]
    assert (first.prompt.messages[-1].content, first.response) == FIRST_DEMONSTRATION


def test_a_larger_source_only_goes_on_longer(world):
    larger = Miniature(Config(seed=0, **{**SIZES, "texts": 1200}))
    assert len(larger.texts("train")) == 1200
    assert larger.texts("train")[:600] == list(world.texts("train"))


def test_splits_share_no_prompt_and_no_topic(prompts):
    topics = {split: {p.truth["topic"] for p in found} for split, found in prompts.items()}
    dialogues = {split: {p.messages for p in found} for split, found in prompts.items()}
    for one, other in (("train", "heldout"), ("train", "adversarial"), ("heldout", "adversarial")):
        assert not dialogues[one] & dialogues[other]
        assert one != "train" or not topics[one] & topics[other]


def test_heldout_facts_are_stated_in_the_corpus(world, prompts):
    relations = {relation.name: relation for relation in RELATIONS}
    text = " ".join(Miniature(Config(seed=0, **{**SIZES, "texts": 6000})).texts("train"))
    for topic in {p.truth["topic"] for p in prompts["heldout"] if p.truth["topic"].split()[0] in CREATURES}:
        creature, relation = topic.split()
        fact = world.world.facts[creature, relation]
        assert text.count(relations[relation].statement.format(subject=creature, value=fact)) > 20


def test_unknown_split_suggests_the_nearest(world):
    with pytest.raises(DataError, match="no split 'held-out' of texts. Did you mean 'heldout'"):
        world.texts("held-out")
    with pytest.raises(DataError, match="no split 'adversarial' of texts"):
        world.texts("adversarial")


# ----------------------------------------------------------------------------------------------------------- tokens


def test_everything_encodes_without_unknown_words_and_in_few_tokens(world, tokenizer, prompts):
    assert 350 <= tokenizer.vocab_size <= 512
    unknown = tokenizer.core.token_to_id("<unk>")
    rendered = [
        tokenizer.encode(tokenizer.render(p.messages, add_generation_prompt=True)) for found in prompts.values() for p in found
    ]
    answers = [tokenizer.encode(d.response) for d in world.demonstrations("train")]
    answers += [tokenizer.encode(text) for c in world.comparisons("heldout") for text in c.completions]
    documents = [tokenizer.encode(text) for text in world.texts("train")]
    items = [tokenizer.encode(f"{c.context} {option}") for c in world.tests()["ability"] for option in c.options]
    assert not any(unknown in ids for ids in rendered + answers + documents + items)
    assert max(map(len, rendered)) <= 28
    assert max(map(len, answers)) + 1 <= 20
    assert 20 <= np.mean([len(ids) for ids in documents]) <= 45


def test_a_dialogue_renders_as_words_with_single_spaces(tokenizer):
    prompt = Prompt.of("what colour is zib ?")
    assert tokenizer.render(prompt.messages, add_generation_prompt=True) == "<user> what colour is zib ? <assistant>"
    assert tokenizer.decode(tokenizer.encode("sure , zib is red . <eos>")) == "sure , zib is red ."


# ------------------------------------------------------------------------------------------------------------- gold


@pytest.mark.parametrize("family", [*FAMILIES, "adversarial"])
def test_a_perfect_response_scores_the_maximum(world, by_family, family):
    assert by_family[family]
    for index, prompt in enumerate(by_family[family]):
        score = world.gold(prompt, responses.write("perfect", Task.of(prompt), Dice(3, "test", index)))
        assert score == pytest.approx({"gold": MAX_GOLD, "helpful": 1, "truthful": 1, "harmless": 1})


@pytest.mark.parametrize(
    "response",
    [
        "",
        "<eos>",
        "<pad> <unk>",
        "sure sure sure sure sure sure sure",
        "\n qwerty {} %s 💥 ,,, ...",
        "red blue green white black brown pink gold plums bread fish nuts",
        "count king owl moon shop cheap win the of is eats with copy pattern",
        " ".join(["of course , i hope that helps you a lot ."] * 20),
    ],
)
def test_garbage_scores_low_everywhere(world, by_family, response):
    for family, prompts in by_family.items():
        for prompt in prompts:
            score = world.gold(prompt, response)
            assert all(0 <= score[part] <= 1 for part in ("helpful", "truthful", "harmless"))
            assert score["gold"] <= 0.35 * MAX_GOLD, family


def test_no_constant_response_is_good(world, by_family):
    """Neither any perfect response to some other prompt, nor a refusal, nor politeness alone."""
    constants = [responses.write("perfect", Task.of(found[0]), Dice(0, "test", 0)) for found in by_family.values()]
    constants += ["sure , i hope that helps you a lot .", "of course ,", "sure , zib is ."]
    assert max(constant_gold(world, by_family, response) for response in constants) < 0.42 * MAX_GOLD


def test_no_manner_fits_every_family(world, by_family):
    def mean_of(manner):
        def write(task, dice):
            return responses.dressed(task.sentence, manner, dice)

        return np.mean([mean_gold(world, found, write) for found in by_family.values()])

    assert max(map(mean_of, ("friendly", "terse", "formal", "greeting", "apology"))) < 0.93 * MAX_GOLD


def test_each_fault_costs_and_partial_virtue_pays(world, by_family):
    (prompt, *_) = by_family["question"]
    right, lie = Task.of(prompt).sentence, Task.of(prompt).lies[0]
    better_to_worse = [
        f"sure , {right}",
        f"{right}",
        f"sure , {lie}",
        f"{lie}",
        "i do not know .",
        f"you fool , {lie}",
        "",
    ]
    golds = [world.gold(prompt, response)["gold"] for response in better_to_worse]
    assert golds == sorted(golds, reverse=True) and len(set(golds)) == len(golds)


def test_a_false_aside_costs_truthfulness(world, by_family):
    (prompt, *_) = by_family["sum"]
    truth = world.world.facts["zib", "home"]
    false = "cave" if truth != "cave" else "lake"
    answer = f"sure , {Task.of(prompt).sentence} zib lives in the"
    assert world.gold(prompt, f"{answer} {truth} .")["truthful"] > 0.8
    assert world.gold(prompt, f"{answer} {false} .")["truthful"] == 0


def test_complying_with_harm_is_harmful_in_every_disguise(world, by_family):
    for prompt in by_family["harmful"] + by_family["adversarial"]:
        (comply,) = Task.of(prompt).lies
        assert world.gold(prompt, comply)["harmless"] == 0
        assert world.gold(prompt, comply)["gold"] < 0.15 * MAX_GOLD


def test_a_strangers_prompt_has_no_gold(world):
    assert world.gold(Prompt.of("what colour is the sky ?"), "blue .") is None


def test_gold_grows_from_the_web_over_demonstrations_to_perfection(world, prompts):
    def write(task, dice):
        return responses.write(dice.weighted(responses.WEB), task, dice)

    web = mean_gold(world, prompts["heldout"], write)
    demonstrated = np.mean([world.gold(d.prompt, d.response)["gold"] for d in world.demonstrations("train")])
    assert web < 0.45 * MAX_GOLD
    assert 0.65 * MAX_GOLD < demonstrated < 0.82 * MAX_GOLD


# --------------------------------------------------------------------------------------------------------- labelers


def test_labelers_agree_with_gold_about_three_times_in_four(world):
    assert 0.70 < labeler_agreement(world.world, world.comparisons("train")) < 0.78


def test_heldout_labelers_never_label_for_training(world):
    assert {c.labeler for c in world.comparisons("train")} == set(TRAINING_LABELERS)
    assert {c.labeler for c in world.comparisons("heldout")} == {*TRAINING_LABELERS, *HELDOUT_LABELERS}


def test_comparisons_rank_four_to_nine_different_completions(world):
    comparisons = list(world.comparisons("train"))
    assert {len(c.completions) for c in comparisons} == set(range(4, 10))
    for comparison in comparisons:
        assert len(set(comparison.completions)) == len(comparison.completions)
        assert min(comparison.ranks) == 0
    assert 0.05 < np.mean([len(set(c.ranks)) < len(c.ranks) for c in comparisons]) < 0.6


def test_utilities_too_close_to_tell_share_a_rank():
    assert numerics.ranks([1.0, 3.0, 2.95, -4.0], 0.15) == (1, 0, 0, 2)


# ---------------------------------------------------------------------------------------------------------- ability


def test_ability_items_have_four_options_of_which_one_is_right(world):
    items = list(world.tests()["ability"])
    assert len(items) == 198
    for item in items:
        assert len(item.options) == len(set(item.options)) == 4
        assert "<" not in item.context
    assert {item.answer for item in items} == {0, 1, 2, 3}


def test_ability_answers_are_correct(world):
    recall, deed, count, copy, pattern, plus = world.tests()["ability"][:6]
    creature, *_ = recall.context.split()
    assert recall.options[recall.answer] in {world.world.facts[creature, relation.name] for relation in RELATIONS}
    assert f"{deed.context} {deed.options[deed.answer]}".startswith("you ")
    assert int(count.options[count.answer]) == int(count.context.split()[-1]) + 1
    given, begun = copy.context.removeprefix("copy ").split(" : ")
    assert given.split()[len(begun.split())] == copy.options[copy.answer]
    period = len(set(pattern.context.split()[1:]))
    assert pattern.options[pattern.answer] == pattern.context.split()[-period]
    assert int(plus.options[plus.answer]) == sum(int(word) for word in plus.context.split() if word.isdigit())


def test_prompts_and_raw_texts_may_be_of_some_kinds_only(world):
    keys = {"families": ["sum", "count"], "documents": ["sums"], "heldout_prompts": 40, "prompts": 40}
    some = Miniature(parse(Config, keys, "data"))
    prompts = [*some.prompts("train"), *some.prompts("heldout"), *(d.prompt for d in islice(some.demonstrations("train"), 40))]
    prompts += [c.prompt for c in islice(some.comparisons("heldout"), 20)]
    assert {prompt.truth["family"] for prompt in prompts} == {"sum", "count"}
    sums = [prompt for prompt in prompts if prompt.truth["family"] == "sum"]
    assert all(int(p.truth["answer"]) == sum(map(int, p.messages[0].content.split()[2:5:2])) for p in sums)
    assert all(text.split()[1::6] == ["plus"] * 5 and text.count(".") == 5 for text in islice(some.texts("train"), 30))
    assert some.prompts("adversarial")[0].truth["family"] == "adversarial"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"families": []}, "data.families is empty"),
        ({"families": ["sums"]}, "data.families has 'sums', which is none. Did you mean 'sum'?"),
        ({"documents": ["sum"]}, "data.documents has 'sum', which is none. Did you mean 'sums'?"),
    ],
)
def test_kinds_that_are_none_are_refused(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(Config, keys, "data")
