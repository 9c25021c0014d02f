"""Contestant: TRL's trainers, with what is not the same arithmetic turned off (bfloat16, gradient checkpointing)."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from worker import Contestant, rule, texts

WARM_UP = 2
STEPS = 1000  # more than are ever asked for


class Turns(TrainerCallback):
    """A step of the trainer per turn."""

    def __init__(self, contestant: Contestant):
        self.contestant, self.done = contestant, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.done += 1
        if self.done < WARM_UP:
            return
        if self.done == WARM_UP:
            versions = {"torch": torch, "transformers": transformers, "trl": trl}
            self.contestant.ready(**{name: module.__version__ for name, module in versions.items()})
        else:
            self.contestant.finished()
        self.contestant.await_turn()


class Maker:
    """Models, data and settings that the trainers share."""

    def __init__(self, contestant: Contestant):
        self.work, self.precision, self.device = contestant.work, contestant.options["precision"], contestant.device
        self.folder = contestant.models / self.work.size
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "policy")

    def policy(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "policy", dtype=torch.float32)

    def scalar(self) -> Any:
        kind = AutoModelForSequenceClassification
        model = kind.from_pretrained(self.folder / "reward", dtype=torch.float32, num_labels=1)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def data(self, rows: int, **columns: tuple[int, int]) -> datasets.Dataset:
        """Token ids under each name, of (words, seed)."""
        columns = {name: texts(rows, words, seed) for name, (words, seed) in columns.items()}
        ids = {name: [self.tokenizer(text)["input_ids"] for text in column] for name, column in columns.items()}
        return datasets.Dataset.from_dict(ids)

    def common(self, rows: int) -> dict[str, Any]:
        return {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-5,
            "adam_beta2": 0.95,
            "lr_scheduler_type": "constant",
            "bf16": self.precision == "bfloat16",
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": self.device == "cpu",
            "disable_tqdm": True,
        }


def sft(maker: Maker, turns: Turns) -> Any:
    work = maker.work
    data = maker.data(64 * work.rows, input_ids=(work.prompt + work.response, 1))
    config = trl.SFTConfig(**maker.common(work.rows), max_steps=STEPS, max_length=None, logging_steps=STEPS)
    return trl.SFTTrainer(maker.policy(), config, train_dataset=data, processing_class=maker.tokenizer, callbacks=[turns])


def reward(maker: Maker, turns: Turns) -> Any:
    pairs = maker.work.rows // 2
    length = maker.work.prompt + maker.work.response
    data = maker.data(64 * pairs, chosen_ids=(length, 0), rejected_ids=(length, 1))
    config = trl.RewardConfig(**maker.common(pairs), max_steps=STEPS, max_length=None, logging_steps=STEPS)
    return trl.RewardTrainer(maker.scalar(), config, train_dataset=data, processing_class=maker.tokenizer, callbacks=[turns])


def ppo(maker: Maker, turns: Turns) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work = maker.work
    data = maker.data(64 * work.rows, input_ids=(work.prompt, 1))
    config = PPOConfig(
        **maker.common(work.rows),
        total_episodes=STEPS * work.rows,
        num_ppo_epochs=work.epochs,
        num_mini_batches=1,
        local_rollout_forward_batch_size=work.rows,
        response_length=work.response,
        temperature=1.0,
        num_sample_generations=0,
        kl_coef=0.02,
        stop_token_id=maker.tokenizer.eos_token_id,
        logging_steps=1,
    )
    policy, ref_policy, reward_model, value_model = maker.policy(), maker.policy(), maker.scalar(), maker.scalar()
    heldout = data.select(range(8))
    return PPOTrainer(
        config, maker.tokenizer, policy, ref_policy, reward_model, data, value_model, eval_dataset=heldout, callbacks=[turns]
    )


def grpo(maker: Maker, turns: Turns) -> Any:
    """GRPO's loss with a reference. TRL's defaults are DAPO's mean and no reference."""
    work = maker.work
    config = trl.GRPOConfig(
        **maker.common(work.rows),
        max_steps=STEPS,
        num_generations=work.completions,
        num_iterations=work.epochs,
        max_completion_length=work.response,
        temperature=1.0,
        beta=0.04,
        loss_type="grpo",
        logging_steps=STEPS,
    )
    data = datasets.Dataset.from_dict({"prompt": texts(64 * work.rows, work.prompt, 1)})
    rewards = lambda completion_ids, **_: [rule(ids) for ids in completion_ids]  # noqa: E731
    return trl.GRPOTrainer(
        maker.policy(), rewards, config, train_dataset=data, processing_class=maker.tokenizer, callbacks=[turns]
    )


def main() -> None:
    contestant = Contestant()
    torch.set_num_threads(contestant.options["threads"])
    if contestant.device == "cuda":
        contestant.wait, contestant.peak_bytes = torch.cuda.synchronize, torch.cuda.max_memory_allocated
    make = {"sft": sft, "reward": reward, "ppo": ppo, "grpo": grpo}[contestant.work.task]
    make(Maker(contestant), Turns(contestant)).train()


if __name__ == "__main__":
    main()
