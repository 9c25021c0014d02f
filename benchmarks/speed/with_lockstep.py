"""Contestant: Lockstep's own algorithms, through the public interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from profiles import PROFILES
from worker import Contestant, Work, rule, texts

from lockstep.config.schema import parse
from lockstep.interfaces import Algorithm, Backend, Context, DataSource, Policy, Responses, RewardModel
from lockstep.learning.randomness import token_seeds
from lockstep.registry import registry
from lockstep.text.sequences import left_pad
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep.types import Comparison, Demonstration, Message, Prompt
from lockstep_rlhf.reward_models.learned import Learned

STEPS = 1000  # more than are ever asked for
ALGORITHMS = {"sft": "sft", "reward": "reward_modelling", "ppo": "ppo", "grpo": "policy_gradient", "generate": "ppo"}


class Texts(DataSource):
    """Prompts, demonstrations and pairs of exactly the lengths of the work; all of a response counts, none has an EOS."""

    def __init__(self, work: Work):
        rows = 64 * work.rows
        self.asked = [Prompt((Message("user", text),)) for text in texts(rows, work.prompt, 1)]
        self.answers = [texts(rows, work.response, seed) for seed in range(2, 2 + work.completions)]

    def texts(self, split: str) -> Sequence[str]:
        return ()

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return [Demonstration(*row) for row in zip(self.asked, self.answers[0], strict=True)] if split == "train" else []

    def comparisons(self, split: str) -> Sequence[Comparison]:
        rows = zip(self.asked, zip(*self.answers, strict=True), strict=True)
        return [Comparison(prompt, answers, tuple(range(len(answers)))) for prompt, answers in rows] if split == "train" else []

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self.asked


def main() -> None:
    contestant = Contestant()
    work, options = contestant.work, contestant.options
    backend = backend_named(options["backend"], options, contestant.device)
    contestant.peak_bytes = backend.peak_memory_bytes
    algorithm = algorithm_of(contestant.models / work.size, work, options, backend)
    steps = iter(range(STEPS))
    step = (lambda: generate(algorithm, work)) if work.task == "generate" else (lambda: algorithm.step(next(steps)))
    described = backend.describe()
    contestant.serve(step, PROFILES[options["backend"]], **{options["backend"]: described[options["backend"]]})


def algorithm_of(folder: Path, work: Work, options: dict[str, Any], backend: Backend) -> Algorithm:
    """Lockstep's defaults, but for what the work says and for what TRL does otherwise."""
    kind = registry().resolve("policy", "huggingface" if work.size == "smollm2" else "decoder", backend.name)
    tokenizer = Tokenizer.load(str(folder / "policy"), TokenizerConfig(None, None, None, None))
    name = ALGORITHMS[work.task]
    cls = registry().resolve("algorithm", name)
    adam = {"learning_rate": 1e-5, "eps": 1e-8}
    values = {
        "lengths": {"prompt": work.prompt, "response": work.response, "multiple": max(work.prompt, work.response)},
        "schedule": {"shape": "constant", "warmup_steps": 0, "initial": 1.0, "final": 1.0},
        "optimizer": adam,
    }
    if name == "ppo":
        values |= {"value_optimizer": adam}
        values |= {"iterations": STEPS, "batch_size": work.rows, "epochs": work.epochs, "minibatches": 1}
        values |= {"unfinished_score": None, "value_network": options.get("value_network", "separate")}
    elif name == "policy_gradient":
        values |= {"iterations": STEPS, "batch_size": work.rows // work.completions, "samples": work.completions}
        values |= {"epochs": work.epochs, "minibatches": 1, "kl_coef": 0.04}
    else:
        rows = work.rows // work.completions if name == "reward_modelling" else work.rows
        values |= {"epochs": float(STEPS), "batch_size": rows, "heldout_examples": 0}
    if name == "reward_modelling":
        values |= {"normalise": "none"}
    reward_model: RewardModel | None = None
    if name == "ppo":
        reward_model = reward_model_of(folder, kind, backend, tokenizer)
    elif name == "policy_gradient":
        reward_model = Rule()
    context = Context(0, backend, tokenizer, Texts(work), kind.load(folder / "policy", backend), reward_model)
    return cls(parse(cls.Config, values, "algorithm"), context)


class Rule(RewardModel):
    def __init__(self):
        pass

    def score(self, responses: Responses) -> np.ndarray:
        rows = responses.sequences
        return np.array([rule(ids[mask].tolist()) for ids, mask in zip(rows.responses, rows.mask, strict=True)], np.float32)


def reward_model_of(folder: Path, kind: type[Policy], backend: Backend, tokenizer: Tokenizer) -> RewardModel:
    class Resources:
        """What the reward model asks for."""

        def kind(self, source: str) -> str:
            return "stage"

        def scalar_model(self, source: str) -> Any:
            return kind.load_scalar(folder / source, backend), tokenizer

    tokenizer.check_embedding = lambda *_: None  # EOS lies outside on purpose: no response ends
    resources = Resources()
    resources.backend, resources.tokenizer = backend, tokenizer
    return Learned(Learned.Config("reward", None, None), resources)


def generate(algorithm: Any, work: Work) -> None:
    tokens, mask = left_pad(algorithm.prompt_ids[: work.rows], algorithm.tokenizer.pad_id, work.prompt)
    seeds = token_seeds(0, "sampling", 0, work.rows, work.response)
    stops, pad = [algorithm.tokenizer.eos_id], algorithm.tokenizer.pad_id
    drawn = algorithm.policy.generate(tokens, mask, seeds, temperature=1.0, stop_ids=stops, pad_id=pad)
    assert drawn.mask.all()


def backend_named(name: str, options: dict[str, Any], device: str) -> Backend:
    """Lockstep's defaults, but for the device, the precision, graphs, the threads (as many as the others have) and the cache of
    programs."""
    cls = registry().resolve("backend", name, name)
    values = {"precision": options["precision"]}
    own = {
        "torch": {"device": device, "threads": options["threads"], "compile": options.get("compile", False)},
        "jax": {"device": {"cpu": "cpu", "cuda": "gpu"}[device], "compilation_cache": options.get("compilation_cache")},
    }[name]
    if name == "jax" and device == "cuda":  # as torch and TRL
        own["gradient_checkpointing"] = False
    return cls(parse(cls.Config, values | own, "backend"))


if __name__ == "__main__":
    main()
