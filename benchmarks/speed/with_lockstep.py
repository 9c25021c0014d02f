"""Contestant: Lockstep's own algorithms, through the public interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker import Contestant, Work, texts

from lockstep.encoding import Lengths
from lockstep.interfaces import DataSource, Setting
from lockstep.nouns import Comparison, Demonstration, Message, Prompt
from lockstep.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.registry import registry
from lockstep.tokenizer import Tokenizer, TokenizerConfig
from lockstep_rlhf.language_modelling import SFT
from lockstep_rlhf.ppo import PPO
from lockstep_rlhf.reward_modelling import RewardModelling
from lockstep_rlhf.reward_models import Learned

ADAM = OptimizerConfig(1e-5, (0.9, 0.95), 1e-8, tf_style=False, weight_decay=0.0, max_grad_norm=1.0, ema_decay=None)
SCHEDULE = ScheduleConfig("constant", 0, 1.0, 1.0)
STEPS = 1000  # more than are ever asked for


class Texts(DataSource):
    """Prompts, demonstrations and pairs of exactly the lengths of the work; all of a response counts, none has an EOS."""

    def __init__(self, work: Work):
        rows = 64 * work.rows
        self.work = work
        self.asked = [Prompt((Message("user", text),)) for text in texts(rows, work.prompt, 1)]
        self.answers = [texts(rows, work.response, seed) for seed in (2, 3)]

    def texts(self, split: str) -> Sequence[str]:
        return ()

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return [Demonstration(*row) for row in zip(self.asked, self.answers[0], strict=True)] if split == "train" else []

    def comparisons(self, split: str) -> Sequence[Comparison]:
        rows = zip(self.asked, zip(*self.answers, strict=True), strict=True)
        return [Comparison(prompt, answers, (0, 1)) for prompt, answers in rows] if split == "train" else []

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self.asked


def main() -> None:
    contestant = Contestant()
    work, options = contestant.work, contestant.options
    name = options["backend"]
    backend = backend_named(name, options)
    folder = contestant.models / work.size
    tokenizer = Tokenizer.load(str(folder / "policy"), TokenizerConfig(None, None, None, None))
    kind = registry().resolve("policy", "huggingface" if work.size == "smollm2" else "decoder", name)

    class Rewards:
        """What the reward model asks for."""

        def __init__(self) -> None:
            self.backend, self.tokenizer = backend, tokenizer

        def scalar_model(self, source: str) -> Any:
            return kind.load_scalar(folder / "reward", backend), tokenizer

    lengths = Lengths(work.prompt, work.response, max(work.prompt, work.response))
    reward_model = Learned(Learned.Config("reward", None), Rewards()) if work.task in ("ppo", "generate") else None
    setting = Setting(0, backend, tokenizer, Texts(work), kind.load(folder / "policy", backend), reward_model)
    common = {"epochs": float(STEPS), "micro_batch_size": None, "lengths": lengths, "heldout_examples": 0}
    trained = {"optimizer": ADAM, "schedule": SCHEDULE}
    if work.task == "sft":
        config = SFT.Config(batch_size=work.rows, prompt_loss=False, pretrain_mix=0, dropout=0, **common, **trained)
        algorithm = SFT(config, setting)
    elif work.task == "reward":
        algorithm = RewardModelling(
            RewardModelling.Config(batch_size=work.rows // 2, normalise="none", **common, **trained), setting
        )
    else:
        algorithm = PPO(
            PPO.Config(
                **trained,
                iterations=STEPS,
                batch_size=work.rows,
                epochs=work.epochs,
                minibatches=1,
                micro_batch_size=None,
                lengths=lengths,
                temperature=1.0,
                kl_coef=0.02,
                kl_target=None,
                kl_horizon=10000,
                gamma=1.0,
                lam=0.95,
                clip_range=0.2,
                value_clip_range=0.2,
                value_coef=0.1,
                value_network=options.get("value_network", "separate"),
                whiten_advantages=True,
                whiten_rewards=False,
                unfinished_score=None,
                importance_cap=None,
                ptx_coef=0.0,
                ptx_ratio=1.0,
                value_optimizer=ADAM,
            ),
            setting,
        )
    steps = iter(range(STEPS))
    step = (lambda: generate(algorithm, work)) if work.task == "generate" else (lambda: algorithm.step(next(steps)))
    described = {key: value for key, value in backend.describe().items() if key != "device"}
    contestant.serve(step, **described)


def generate(algorithm: PPO, work: Work) -> None:
    from lockstep.randomness import token_seeds
    from lockstep.sequences import left_pad

    tokens, mask = left_pad(algorithm.prompt_ids[: work.rows], algorithm.tokenizer.pad_id, work.prompt)
    seeds = token_seeds(0, "sampling", 0, work.rows, work.response)
    stops, pad = [algorithm.tokenizer.eos_id], algorithm.tokenizer.pad_id
    drawn = algorithm.policy.generate(tokens, mask, seeds, temperature=1.0, stop_ids=stops, pad_id=pad)
    assert drawn.mask.all()


def backend_named(name: str, options: dict[str, Any]) -> Any:
    cls = registry().resolve("backend", name, name)
    own = {"torch": {"threads": options["threads"]}, "jax": {"compilation_cache": None}}[name]
    return cls(cls.Config(device="auto", precision=options["precision"], **own, **options.get("backend_options", {})))


if __name__ == "__main__":
    main()
