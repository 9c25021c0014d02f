"""SFT and reward-model training by TRL, step by step, as numbers for tests/test_outsiders.py.

TRL is no dependency of Lockstep: it runs in an environment of its own. There, Lockstep's core (which needs neither torch
nor jax) gives the same initial weights, tokenizer and order of examples, and nothing else.

    python3.11 -m venv /tmp/trl_env
    /tmp/trl_env/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
    PYTHONPATH=framework /tmp/trl_env/bin/python benchmarks/outsiders/trl_losses.py tests/fixtures/outsiders

It writes trl_sft.json and trl_reward.json: the data, the hyper-parameters, and what TRL logged at each optimizer step
(loss, gradient norm before clipping, learning rate), and how far each parameter moved. TRL's trainers are not changed:
they are told to take the rows in the given order.
"""

import json
import sys
import tempfile
from pathlib import Path

import accelerate
import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from lockstep.learning.randomness import example_indices
from lockstep.models.architecture import SCALAR_HEAD, initial_parameters, scalar_head, small_decoder, to_hf
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.tokenizer import Tokenizer

WORDS = [f"w{i}" for i in range(34)]
SIZES = {
    "vocab_size": 37, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48,
    "context_length": 64, "rope_theta": 100.0, "tied": False,
}  # fmt: skip
WEIGHTS = {"architecture": SIZES, "seed": 0, "factor_on_matrices": 10}
ADAM = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
COMMON = {
    "logging_steps": 1, "logging_strategy": "steps", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "num_train_epochs": 1, "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "bf16": False, "fp16": False,
    "use_cpu": True, "seed": 0, "max_length": None, "optim": "adamw_torch",
}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    write(folder / "trl_sft.json", sft())
    write(folder / "trl_reward.json", reward_modelling())


def sft(adam: dict = ADAM, optimizer: type | None = None) -> dict:
    """``optimizer`` (parameters, lr) takes the place of TRL's, for the run ``whole`` alone."""
    rng = np.random.default_rng(20)
    rows = [{"prompt": sentence(rng, 1 + i % 6), "completion": sentence(rng, 1 + (i * 7) % 11)} for i in range(20)]
    settings = {"seed": 0, "steps": 12, "batch_size": 8, "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2}
    runs = {}
    variants = [("whole", 8, False), ("accumulated", 2, False), ("prompt_loss", 8, True)]
    for name, micro, prompt_loss in variants[: 1 if optimizer else None]:
        with tempfile.TemporaryDirectory() as temporary:
            start = initial_parameters(small_decoder(**SIZES), WEIGHTS["seed"])
            path, start = checkpoint(Path(temporary), start, to_hf(small_decoder(**SIZES)))
            args = trl.SFTConfig(
                temporary,
                **COMMON,
                **hyper_parameters(settings, adam, micro),
                completion_only_loss=not prompt_loss,
                shuffle_dataset=False,
            )
            trainer = trl.SFTTrainer(
                str(path),
                args,
                train_dataset=ordered([with_space(r, "completion") for r in rows], settings),
                processing_class=transformers.AutoTokenizer.from_pretrained(path),
                optimizer_cls_and_kwargs=optimizer and (optimizer, {"lr": settings["learning_rate"]}),
            )
            runs[name] = record(trainer, start) | {"micro_batch_size": micro, "prompt_loss": prompt_loss}
    return described("SFTTrainer") | {"settings": settings, "adam": adam, "data": rows, "runs": runs}


def reward_modelling() -> dict:
    rng = np.random.default_rng(21)
    rows = [
        {"prompt": sentence(rng, 1 + i % 6), "chosen": sentence(rng, 1 + (i * 7) % 11), "rejected": sentence(rng, 1 + i % 9)}
        for i in range(20)
    ]
    settings = {"seed": 0, "steps": 10, "batch_size": 6, "learning_rate": 5e-3, "schedule": "linear", "warmup_steps": 0}
    runs = {}
    for name, micro in [("whole", 6), ("accumulated", 2)]:
        with tempfile.TemporaryDirectory() as temporary:
            start = initial_parameters(small_decoder(**SIZES), WEIGHTS["seed"])
            del start["lm_head.weight"]
            config = to_hf(small_decoder(**SIZES)) | {
                "architectures": ["LlamaForSequenceClassification"],
                "num_labels": 1,
                "pad_token_id": 36,
            }
            head = scalar_head(SIZES["hidden_size"], settings["seed"])[None]
            path, start = checkpoint(Path(temporary), start, config, {SCALAR_HEAD: head})
            model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
            trainer = trl.RewardTrainer(
                model,
                trl.RewardConfig(temporary, **COMMON, **hyper_parameters(settings, ADAM, micro)),
                train_dataset=ordered([with_space(r, "chosen", "rejected") for r in rows], settings),
                processing_class=transformers.AutoTokenizer.from_pretrained(path),
            )
            runs[name] = record(trainer, start) | {"micro_batch_size": micro}
    return described("RewardTrainer") | {"settings": settings, "adam": ADAM, "data": rows, "runs": runs}


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def with_space(row: dict, *names: str) -> dict:
    """TRL joins prompt and completion as strings."""
    return row | {name: " " + row[name] for name in names}


def ordered(rows: list[dict], settings: dict) -> datasets.Dataset:
    """All batches of the run, in Lockstep's order, as one pass."""
    count = settings["steps"] * settings["batch_size"]
    order = example_indices(settings["seed"], "order", len(rows), 0, count)
    return datasets.Dataset.from_list([rows[i] for i in order])


def hyper_parameters(settings: dict, adam: dict, micro: int) -> dict:
    return {
        "adam_beta1": adam["betas"][0],
        "adam_beta2": adam["betas"][1],
        "adam_epsilon": adam["eps"],
        "weight_decay": adam["weight_decay"],
        "max_grad_norm": adam["max_grad_norm"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings["batch_size"] // micro,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["schedule"],
        "warmup_steps": settings["warmup_steps"],
    }


def checkpoint(folder: Path, parameters: dict, config: dict, extra: dict | None = None) -> tuple[Path, dict]:
    """A Hugging Face folder, with matrices scaled up to the size of trained ones, and the parameters in it."""
    path = folder / "model"
    parameters = {n: p * (WEIGHTS["factor_on_matrices"] if p.ndim > 1 else 1) for n, p in parameters.items()} | (extra or {})
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate([*WORDS, "<eos>", "<stop>", "<pad>"])}))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<stop>", "<pad>"])
    Tokenizer(core, eos_token="<stop>", pad_token="<pad>", chat_template=None).save(path)
    write_tensors(path / "model.safetensors", parameters)
    write_json(path / "config.json", config)
    return path, parameters


def record(trainer: transformers.Trainer, start: dict) -> dict:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    end = {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}
    assert end.keys() == start.keys(), end.keys() ^ start.keys()
    first = next(iter(trainer.train_dataset))
    return {
        "first_row": {k: v for k, v in first.items() if k in ("input_ids", "labels", "chosen_ids", "rejected_ids")},
        "loss": [rounded(s["loss"]) for s in steps],
        "grad_norm": [rounded(float(s["grad_norm"])) for s in steps],
        "learning_rate": [rounded(s["learning_rate"]) for s in steps],
        "moved": {name: rounded(float(np.linalg.norm(p.astype(np.float64) - start[name]))) for name, p in end.items()},
    } | {key: [rounded(s[key]) for s in steps] for key in ("accuracy", "margin") if key in steps[0]}


def write(path: Path, fixture: dict) -> None:
    """JSON, one line per array and per record without an array in it."""

    def lines(x, indent: str) -> str:
        if isinstance(x, dict) and any(isinstance(value, dict | list) for value in x.values()):
            inner = indent + " "
            return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {lines(v, inner)}" for k, v in x.items()) + f"\n{indent}}}"
        return json.dumps(x)

    path.write_text(lines(fixture, "") + "\n", encoding="utf-8")


def rounded(x: float) -> float:
    return float(f"{x:.9g}")


def described(trainer: str) -> dict:
    versions = {m.__name__: m.__version__ for m in (trl, transformers, accelerate, datasets, torch, np)}
    return {
        "what": f"{trainer} of TRL on a two-layer Llama, one entry per optimizer step",
        "how": "benchmarks/outsiders/trl_losses.py, float32 on one CPU thread; its docstring has the command",
        "versions": {name: str(version) for name, version in versions.items()},
        "weights": WEIGHTS,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
