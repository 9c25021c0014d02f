"""A contestant of `pipelines.py`: TRL's trainers, with the settings that are Lockstep's under TRL's names."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SPEC = json.loads(sys.argv[1])
DATA, INTO, SETTINGS = Path(SPEC["data"]), Path(SPEC["into"]), SPEC["settings"]
LENGTH = SETTINGS["prompt"] + SETTINGS["response"]
TOKENIZER = AutoTokenizer.from_pretrained(DATA / "policy")


def rows(name: str) -> datasets.Dataset:
    """As texts: trainers end the completions of texts with EOS, and those of dialogues only if the chat template does."""

    def rendered(row: dict[str, Any]) -> dict[str, str]:
        prompt = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        return {"prompt": prompt} | {key: row[key][0]["content"] for key in ("completion", "chosen", "rejected") if key in row}

    return datasets.Dataset.from_list([rendered(json.loads(line)) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")])


def policy(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def scalar(source: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=1)
    model.config.pad_token_id = TOKENIZER.pad_token_id
    return model


def common(stage: str, rows: int) -> dict[str, Any]:
    """Adam's settings and the schedule: cosine to a tenth for SFT and reward model, else constant after ten steps."""
    falls = stage in ("sft", "reward")
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "learning_rate": SETTINGS[stage]["learning_rate"],
        "adam_beta2": 0.95,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 10,
        **(schedule if falls else constant),
    }


def sft() -> Any:
    config = trl.SFTConfig(**common("sft", SETTINGS["sft"]["batch_size"]), num_train_epochs=1, max_length=LENGTH)
    return trl.SFTTrainer(policy(DATA / "policy"), config, train_dataset=rows("demonstrations"), processing_class=TOKENIZER)


def reward() -> Any:
    config = trl.RewardConfig(**common("reward", SETTINGS["reward"]["batch_size"]), num_train_epochs=1, max_length=LENGTH)
    return trl.RewardTrainer(scalar(INTO / "sft"), config, train_dataset=rows("pairs"), processing_class=TOKENIZER)


def ppo() -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    s = SETTINGS["ppo"]
    config = PPOConfig(
        **common("ppo", s["batch_size"]),
        total_episodes=s["iterations"] * s["batch_size"],
        num_ppo_epochs=1,
        num_mini_batches=s["minibatches"],
        local_rollout_forward_batch_size=s["batch_size"],
        response_length=SETTINGS["response"],
        temperature=1.0,
        num_sample_generations=0,
        kl_coef=s["kl_coef"],
        missing_eos_penalty=1.0,
        stop_token_id=TOKENIZER.eos_token_id,
    )
    TOKENIZER.padding_side = "left"
    tokens = TOKENIZER(list(rows("prompts")["prompt"]), add_special_tokens=False)["input_ids"]
    data = datasets.Dataset.from_dict({"input_ids": [ids for ids in tokens if len(ids) <= SETTINGS["prompt"]]})
    models = policy(INTO / "sft"), policy(INTO / "sft"), scalar(INTO / "reward")
    return PPOTrainer(config, TOKENIZER, *models, data, scalar(INTO / "reward"), eval_dataset=data.select(range(8)))


def grpo() -> Any:
    s = SETTINGS["grpo"]
    config = trl.GRPOConfig(
        **common("grpo", s["batch_size"] * s["samples"]),
        max_steps=s["iterations"],
        num_generations=s["samples"],
        num_iterations=1,
        max_completion_length=SETTINGS["response"],
        temperature=1.0,
        beta=s["kl_coef"],
        loss_type="grpo",
    )
    return trl.GRPOTrainer(
        policy(INTO / "sft"), scalar(INTO / "reward"), config, train_dataset=rows("prompts"), processing_class=TOKENIZER,
        reward_processing_classes=TOKENIZER,
    )  # fmt: skip


def dpo() -> Any:
    s = SETTINGS["dpo"]
    config = trl.DPOConfig(**common("dpo", s["batch_size"]), num_train_epochs=1, beta=s["beta"], max_length=LENGTH)
    return trl.DPOTrainer(policy(INTO / "sft"), args=config, train_dataset=rows("pairs"), processing_class=TOKENIZER)


def main() -> None:
    torch.set_num_threads(SPEC["threads"])
    seconds = {}
    for stage in SPEC["stages"]:
        started = time.perf_counter()
        trainer = {"sft": sft, "reward": reward, "ppo": ppo, "grpo": grpo, "dpo": dpo}[stage]()
        trainer.train()
        trainer.save_model(str(INTO / stage))
        TOKENIZER.save_pretrained(str(INTO / stage))
        seconds[stage] = time.perf_counter() - started
        (INTO / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
