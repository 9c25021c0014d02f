"""The conformance kit: no false alarm on the built-in plugins, and every deliberate defect caught by the right check."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import numpy as np
import pytest

from conftest import BACKENDS
from defects import DEFECTS, KINDS, broken, caught
from defects.engines import Within
from lockstep.checking.conformance import checks, conform, subject
from lockstep.checking.conformance.kit import KINDS as MODULES
from lockstep.checking.conformance.world import WORDS, tokenizer
from lockstep.config.schema import setting
from lockstep.learning.online import Clock, Corrected, CorrectedConfig
from lockstep.storage.files import read_json
from lockstep_rlhf.algorithms.policy_gradient import PolicyGradientLoss
from test_processes import several
from test_reward_endpoint import Server, scores
from test_reward_judge import between, said
from vllm_server import FakeVLLM

for _module in (module for modules in MODULES.values() for module in modules):
    importlib.import_module(f"defects.{_module}")

BUILT_IN = [
    ("backend", None),
    ("policy", "decoder"),
    ("policy", "huggingface"),
    ("policy", "lora"),
    ("reward_model", "learned"),
    ("reward_model", "function"),
    ("reward_model", "ensemble"),
    ("reward_model", "sum"),
    ("reward_model", "answer"),
    ("reward_model", "pattern"),
    ("reward_model", "length"),
    ("reward_model", "code"),
    ("reward_model", "attack"),
    ("reward_model", "citations"),
    ("algorithm", "pretrain"),
    ("algorithm", "sft"),
    ("algorithm", "reward_modelling"),
    ("algorithm", "ppo"),
    ("algorithm", "policy_gradient"),
    ("algorithm", "distillation"),
    ("algorithm", "online_preferences"),
    ("algorithm", "rejection_sampling"),
    ("algorithm", "preference_optimisation"),
]


IN_FLOAT32 = (
    "pretrain", "sft", "reward_modelling", "policy_gradient", "distillation", "online_preferences", "rejection_sampling",
    "preference_optimisation", "sum", "answer", "pattern", "length", "code", "attack", "citations",
)  # fmt: skip
"""In bfloat16 they do nothing that the others do not."""
ON_TORCH = ("sum", "answer", "pattern", "length", "code", "citations")
"""They know no backend."""
WHERE = [
    (kind, name, precision, backend)
    for kind, name in BUILT_IN
    for precision in ("float32", "bfloat16")
    for backend in BACKENDS
    if (name not in IN_FLOAT32 or precision == "float32") and (name not in ON_TORCH or backend == "torch")
]


@pytest.mark.parametrize(("kind", "name", "precision", "backend"), WHERE, ids=str)
def test_no_false_alarm_on_a_built_in_plugin(kind, name, precision, backend):
    overrides = [f"backend.{key}={value}" for key, value in BACKENDS[backend].items() if key != "precision" and value is not None]
    found = list(conform(kind, subject(kind, name or backend, backend, precision=precision, overrides=overrides)))
    assert [f"{o.check.name}: {o.detail}" for o in found if o.status == "failed"] == []
    assert sum(o.status == "passed" for o in found) > len(found) / 4


def score(body):
    return scores(*(len(response) / 3 for response in body["responses"]))


def opinion(body):
    """A judge of one response, or of two, that counts characters."""
    prompt = body["messages"][0]["content"]
    if "Score:" in prompt:
        return said(f"Score: {1 + len(between(prompt, 'response')) % 10}")
    return said(f"Verdict: {max('ab', key=lambda name: len(between(prompt, name))).upper()}")


@pytest.mark.parametrize(("name", "answer"), [("endpoint", score), ("judge", opinion), ("judge_pairwise", opinion)])
def test_no_false_alarm_on_rewards_from_a_server(name, answer):
    server = Server(answer)
    url = server.url if name == "endpoint" else f"{server.url.removesuffix('/score')}/v1"
    given = ["backend.threads=1", f"reward_model.url={url}", *(["reward_model.model=m-1"] if name != "endpoint" else [])]
    try:
        component = name.removesuffix("_pairwise")
        found = list(conform("reward_model", subject("reward_model", component, "torch", overrides=given, like=name)))
    finally:
        server.server.shutdown()
        server.server.server_close()
    assert [f"{o.check.name}: {o.detail}" for o in found if o.status == "failed"] == []
    assert sum(o.status == "passed" for o in found) >= 6 and server.asked


def test_no_false_alarm_on_a_built_in_environment():
    for name in ("shop", "tools", "search", "target"):
        found = list(conform("environment", subject("environment", name, "torch", overrides=["backend.threads=1"])))
        assert [(o.check.name, o.detail) for o in found if o.status != "passed"] == []


def test_no_false_alarm_on_a_built_in_labeler():
    for name in ("miniature", "scores"):
        found = list(conform("labeler", subject("labeler", name, "torch", overrides=["backend.threads=1"])))
        assert [(o.check.name, o.detail) for o in found if o.status != "passed"] == []
    waiting = list(conform("labeler", subject("labeler", "people", "torch", overrides=["backend.threads=1"])))
    assert {(o.status, o.detail) for o in waiting} == {("inapplicable", "it waits for people")}


def test_no_false_alarm_on_a_built_in_attacker():
    several = ["attacker.target={policy: world, turns: 2}", "attacker.lengths.response=30"]
    for name, overrides in (("miniature", []), ("templates", []), ("policy", []), ("policy", several)):
        found = list(conform("attacker", subject("attacker", name, "torch", overrides=["backend.threads=1", *overrides])))
        assert [(o.check.name, o.detail) for o in found if o.status != "passed"] == []


def test_no_false_alarm_on_an_engine():
    assert [(o.check.name, o.detail) for o in conform("engine", broken("engine", Within)) if o.status != "passed"] == []


@pytest.mark.parametrize("sampler", ["lockstep", "vllm"])
def test_no_false_alarm_on_the_client_of_a_server(sampler):
    server = FakeVLLM(processor=sampler == "lockstep", mode=f"processed_{'logits' if sampler == 'lockstep' else 'logprobs'}")
    given = ["backend.threads=1", f"engine.server.url={server.url}", f"engine.sampler={sampler}"]
    try:
        found = list(conform("engine", subject("engine", "vllm", "torch", overrides=given)))
    finally:
        server.close()
    assert [(o.check.name, o.detail) for o in found if o.status != "passed"] == []


OTHERWISE = {
    "two responses per prompt": ("policy_gradient", "grpo", ["samples=2"]),
    "four minibatches of sixteen": ("policy_gradient", "grpo", ["samples=16", "minibatches=4"]),
    "masked responses": ("policy_gradient", "grpo", ["mask_unfinished=true"]),
    "weights": ("policy_gradient", "cispo", []),
    "rankings": ("preference_optimisation", "dpo", ["ranking=plackett_luce", "batch_size=5"]),
    "its own mismatch": ("preference_optimisation", "kto", ["batch_size=3"]),
    "several examples in a row": ("sft", "sft", ["packing=true"]),
    "a mix": ("sft", "sft", ["pretrain_mix=0.3", "batch_size=5"]),
    "minibatches of another size": ("rejection_sampling", "rejection_sampling", ["minibatches=4"]),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_no_false_alarm_with_other_values(case):
    name, like, values = OTHERWISE[case]
    overrides = ["backend.threads=1", *(f"algorithm.{value}" for value in values)]
    found = list(conform("algorithm", subject("algorithm", name, "torch", precision="float32", overrides=overrides, like=like)))
    assert [f"{o.check.name}: {o.detail}" for o in found if o.status == "failed"] == []


@dataclass(frozen=True)
class OtherNames(CorrectedConfig):
    """GRPO's, under names that nobody else has."""

    group: int = setting(4, "Responses per prompt.", least=2)
    reach: float = setting(0.3, "The clip.", above=0)

    def __post_init__(self):
        object.__setattr__(self, "samples", self.group)
        super().__post_init__()


class Renamed(Corrected):
    """GRPO without whatever is not checked here."""

    Config = OtherNames

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = PolicyGradientLoss("ratio", config.reach, config.reach, None, False, None, 0.0)

    def step(self, step):
        rollout = self.last = self.rollout(step, Clock())
        mask, groups = rollout.sequences.mask, rollout.scores.reshape(-1, self.config.group)
        there = rollout.counted.reshape(groups.shape)
        centred = groups - np.nanmean(np.where(there, groups, np.nan), axis=1, keepdims=True, dtype=np.float64)
        equal = np.nanmax(groups, axis=1, keepdims=True) == np.nanmin(groups, axis=1, keepdims=True)
        advantages = np.where(equal | ~there, 0, centred).reshape(-1, 1)
        batch = {"mask": mask, "old_logprobs": rollout.old_logprobs, "correction": self.correction(rollout)}
        batch["advantages"] = np.where(mask, advantages, 0).astype(np.float32)
        return self.objective(rollout) | self.train(step, rollout.sequences, batch)

    @classmethod
    def traits(cls, config):
        return replace(super().traits(config), compares=True, clip="ratio", bounds=(1 - config.reach, 1 + config.reach))


def test_the_checks_of_an_algorithm_follow_its_traits_whatever_its_keys_are_called():
    target = subject("algorithm", f"{__name__}:Renamed", "torch", precision="float32", overrides=["backend.threads=1"])
    assert (target.config.group, target.traits.samples) == (4, 4)
    only = {
        "a_prompt_has_several_samples", "equal_rewards_say_nothing", "responses_that_do_not_count_shift_nothing",
        "the_better_response_has_the_higher_advantage", "clipping_binds", "its_traits_are_true", "optimizer_steps_are_counted",
    }  # fmt: skip
    found = list(conform("algorithm", target, only=lambda check: check.name in only))
    assert {o.check.name: (o.status, o.detail) for o in found} == {name: ("passed", "") for name in only}


def test_the_worlds_tokenizer_knows_every_word_and_keeps_its_own():
    core = tokenizer()
    own = [*WORDS, "<eos>", "<stop>", "<pad>"]
    assert core.encode(" ".join(own)) == list(range(37))
    text = "Human: w1 says that w34, w4w5 and 'w2' are <b>good</b>! 你好 w33"
    found = core.encode(text)
    assert len(found) == len(text.split()) and set(found) <= set(range(34))
    assert (found[1], found[-1]) == (1, 33) and len(set(found)) > 4


@pytest.fixture(scope="module")
def several_caught(tmp_path_factory):
    """{class: (status, detail)} of the defects that need two processes, which are started once for all of them."""
    file = tmp_path_factory.mktemp("several") / "found.json"
    several(2, file, program="defects_of_several.py", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    return {name: (status, detail) for name, status, detail in read_json(file)}


@pytest.mark.parametrize(
    ("kind", "cls", "caught_by"),
    [(kind, *each) for kind in KINDS for each in DEFECTS[kind]],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_deliberate_defect_is_caught_by_the_right_check(kind, cls, caught_by, request):
    assert caught_by in {check.name for check in checks(kind)}
    if kind == "backend" and hasattr(cls, "count"):
        status, detail = request.getfixturevalue("several_caught")[cls.__name__]
    else:
        outcome = caught(kind, cls, caught_by)
        status, detail = outcome.status, outcome.detail
    assert status == "failed", f"{caught_by} let {cls.__name__} through ({status}: {detail})"
    assert any(character.isdigit() for character in detail) or "raised" in detail
    if hasattr(cls, "overrides"):  # on a mesh
        assert "raised" not in detail or "Rank 1 is running collective" in detail


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_has_been_seen_to_fail(kind):
    assert {check.name for check in checks(kind)} == {caught_by for _, caught_by in DEFECTS[kind]}
