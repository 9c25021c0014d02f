"""Contestant: TRL's trainers, with what is not the same arithmetic turned off (bfloat16, gradient checkpointing)."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from worker import Contestant, texts

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


def main() -> None:
    contestant = Contestant()
    work, options = contestant.work, contestant.options
    torch.set_num_threads(options["threads"])
    folder = contestant.models / work.size
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = lambda: AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)  # noqa: E731

    def scalar() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    ids = lambda count, words, seed: [tokenizer(text)["input_ids"] for text in texts(count, words, seed)]  # noqa: E731
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": work.rows,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant",
        "bf16": options["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    turns = Turns(contestant)
    rows = 64 * work.rows
    if work.task == "sft":
        data = datasets.Dataset.from_dict({"input_ids": ids(rows, work.prompt + work.response, 1)})
        config = trl.SFTConfig(**common, max_steps=STEPS, max_length=None, logging_steps=STEPS)
        trainer = trl.SFTTrainer(policy(), config, train_dataset=data, processing_class=tokenizer, callbacks=[turns])
    elif work.task == "reward":
        length = work.prompt + work.response
        pairs = {f"{side}_ids": ids(rows // 2, length, seed) for seed, side in enumerate(("chosen", "rejected"))}
        data = datasets.Dataset.from_dict(pairs)
        config = trl.RewardConfig(
            **{**common, "per_device_train_batch_size": work.rows // 2}, max_steps=STEPS, max_length=None, logging_steps=STEPS
        )
        trainer = trl.RewardTrainer(scalar(), config, train_dataset=data, processing_class=tokenizer, callbacks=[turns])
    elif work.task == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        data = datasets.Dataset.from_dict({"input_ids": ids(rows, work.prompt, 1)})
        config = PPOConfig(
            **common,
            total_episodes=STEPS * work.rows,
            num_ppo_epochs=work.epochs,
            num_mini_batches=1,
            local_rollout_forward_batch_size=work.rows,
            response_length=work.response,
            temperature=1.0,
            num_sample_generations=0,
            kl_coef=0.02,
            stop_token_id=tokenizer.eos_token_id,
            logging_steps=1,
        )
        trainer = PPOTrainer(
            config, tokenizer, policy(), policy(), scalar(), data, scalar(), eval_dataset=data.select(range(8)), callbacks=[turns]
        )
    trainer.train()


if __name__ == "__main__":
    main()
