"""TRL's RewardTrainer on the comparisons, split, start and order of a Lockstep reward stage, and both judged alike.

TRL is no dependency of Lockstep: `trl_losses.py` says how its environment is made. Lockstep's core (which needs neither
torch nor jax) reads the stage's configuration and gives the data, the tokens, the order of examples and the initial head;
everything else is TRL's and transformers'. The held-out scores are transformers' for every model, Lockstep's included.

    PYTHONPATH=framework:plugins /tmp/trl_env/bin/python benchmarks/outsiders/trl_reward_smollm2.py \
      runs/stages/reward-torch-... runs/stages/sft-torch-.../output trl_reward_smollm2.json runs/stages/reward-jax-...

Arguments: the reward stage to repeat, the SFT output that it started from, where the numbers go, and further reward stages of
the same split to judge. The working directory is the one the stage ran in, so that the data's paths hold.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
import trl_losses
from trl_losses import COMMON, described, ordered, rounded

from lockstep.data.files import Files
from lockstep.learning.numerics import proportion_interval
from lockstep.models.architecture import SCALAR_HEAD, scalar_head
from lockstep.runs.experiment import settings
from lockstep.storage.files import write_json
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.tokenizer import Tokenizer

PAD = "<|endoftext|>"
"""A token of SmolLM2's vocabulary that no row has. transformers embeds padding, and finds a row's end by it."""


def main(stage: Path, sft: Path, result: Path, *others: Path) -> None:
    torch.set_num_threads(1)
    configuration = json.loads((stage / "stage.json").read_text(encoding="utf-8"))
    config, data = configuration["stage"], configuration["data"]
    tokenizer = Tokenizer.load(sft)
    source = Files(settings(Files, {k: v for k, v in data.items() if k != "fingerprint"}, "data"))
    lengths = Lengths(**config["lengths"])
    train = encoding.encode_comparisons(tokenizer, source.comparisons("train"), lengths)
    heldout = encoding.encode_comparisons(tokenizer, source.comparisons("heldout"), lengths)
    pad = tokenizer.core.token_to_id(PAD)
    margins = {}
    with tempfile.TemporaryDirectory() as folder:
        start = starting_point(sft, Path(folder) / "start", configuration["seed"], pad)
        margins["before"] = heldout_margins(start, heldout, pad)
        trainer = trl.RewardTrainer(
            start,
            trl.RewardConfig(folder, **hyper_parameters(config, len(train))),
            train_dataset=ordered([pair(*row) for row in train], order(config, configuration["seed"], len(train))),
            processing_class=transformers.AutoTokenizer.from_pretrained(sft, pad_token=PAD),
        )
        began = time.time()
        trainer.train()
        seconds = time.time() - began
    margins["TRL"] = heldout_margins(trainer.model, heldout, pad)
    for other in [stage, *others]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(other / "output", num_labels=1)
        margins[json.loads((other / "stage.json").read_text(encoding="utf-8"))["backend"]["name"]] = heldout_margins(
            model, heldout, pad
        )
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = described("RewardTrainer") | {
        "what": "RewardTrainer of TRL and reward stages of Lockstep from one start, on one split",
        "how": "benchmarks/outsiders/trl_reward_smollm2.py, float32 on one CPU thread; its docstring has the command",
        "stage": config,
        "train_comparisons": len(train),
        "heldout_comparisons": len(heldout),
        "seconds": round(seconds),
        "loss": {
            "TRL": [rounded(entry["loss"]) for entry in log],
            **{p.name: [step["loss"] for step in steps(p)] for p in [stage, *others]},
        },
        "accuracy": {name: interval(values) for name, values in margins.items()},
        "log_loss": {name: float(np.logaddexp(0, -values).mean()) for name, values in margins.items()},
        "margins": {name: [round(float(v), 4) for v in values] for name, values in margins.items()},
    }
    del record["weights"]
    write_json(result, record)
    print(json.dumps(record["accuracy"], indent=1))


def starting_point(sft: Path, folder: Path, seed: int, pad: int) -> transformers.PreTrainedModel:
    """The SFT model with Lockstep's initial head on its trunk."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1, pad_token_id=pad)
    with torch.no_grad():
        model.get_parameter(SCALAR_HEAD).copy_(torch.tensor(scalar_head(model.config.hidden_size, seed))[None])
    return model


def order(config: dict, seed: int, rows: int) -> dict:
    return {"seed": seed, "steps": number_of_steps(config, rows), "batch_size": config["batch_size"]}


def number_of_steps(config: dict, rows: int) -> int:
    return max(1, math.ceil(config["epochs"] * rows / config["batch_size"]))


def hyper_parameters(config: dict, rows: int) -> dict:
    optimizer, schedule, micro = config["optimizer"], config["schedule"], config["micro_batch_size"] or config["batch_size"]
    assert schedule["shape"] == "cosine" and not schedule["warmup_steps"] and optimizer["ema_decay"] is None, schedule
    settings = {"batch_size": config["batch_size"], "learning_rate": optimizer["learning_rate"], "warmup_steps": 0}
    shared = trl_losses.hyper_parameters(settings | {"schedule": "cosine_with_min_lr"}, optimizer, micro)
    own = {"lr_scheduler_kwargs": {"min_lr_rate": schedule["final"]}, "max_steps": number_of_steps(config, rows)}
    return COMMON | shared | own | {"optim": "adamw_torch_fused"}  # 135 million parameters: TRL's default, and the faster


def pair(rows: list[Example], ranks: tuple[int, ...]) -> dict:
    best, worst = np.argsort(ranks)
    return {"chosen_ids": tokens(rows[best]), "rejected_ids": tokens(rows[worst])}


def tokens(example: Example) -> list[int]:
    return example.prompt + example.response


@torch.no_grad()
def heldout_margins(model: transformers.PreTrainedModel, comparisons: list, pad: int) -> np.ndarray:
    """Score of the chosen answer minus that of the rejected one, by transformers alone."""
    model.eval()
    model.config.pad_token_id = pad
    margins = []
    for row in comparisons:
        ids = [torch.tensor(x) for x in pair(*row).values()]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        scores = model(input_ids=padded, attention_mask=(padded != pad).long()).logits[:, 0]
        margins.append(float(scores[0] - scores[1]))
    return np.array(margins)


def interval(margins: np.ndarray) -> dict:
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    accuracy, low, high = proportion_interval(right, len(margins))
    return {"accuracy": accuracy, "low": low, "high": high}


def steps(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
