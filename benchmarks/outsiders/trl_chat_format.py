"""What TRL and Lockstep make of the same conversations with SmolLM2's chat template: which tokens, and which of them count.

In the environment of trl_losses.py, with the folder that benchmarks/smollm2.py writes:

    PYTHONPATH=framework /tmp/trl_env/bin/python benchmarks/outsiders/trl_chat_format.py models/smollm2

It prints the difference in tokens and the loss of SmolLM2-135M-Instruct on the counted tokens of either.
"""

import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl
import trl_losses

from lockstep.text.encoding import Lengths, encode_demonstrations
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep.types import Demonstration, Prompt

TURNS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a fruit that is yellow.", "A banana."),
    ("How many days has a week?", "Seven days."),
    ("Translate 'good morning' to Spanish.", "Buenos días."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet, around the year 1600."),
    ("Give me a word that rhymes with 'cat'.", "Hat."),
]


def main(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder, TokenizerConfig(None, None, "<|pad|>", None))
    demonstrations = [Demonstration(Prompt.of(question), answer) for question, answer in TURNS]
    ours = [
        (e.prompt + e.response, [-100] * len(e.prompt) + e.response)
        for e in encode_demonstrations(tokenizer, demonstrations, Lengths(256, 256, 1))
    ]
    rows = [{"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]} for q, a in TURNS]
    with tempfile.TemporaryDirectory() as temporary:
        args = trl.SFTConfig(temporary, **trl_losses.COMMON, completion_only_loss=True, shuffle_dataset=False)
        trainer = trl.SFTTrainer(
            str(folder),
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
    theirs = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    decode = lambda ids: [tokenizer.core.id_to_token(i) for i in ids]  # noqa: E731
    for (own, own_labels), (ids, labels) in zip(ours, theirs, strict=True):
        print(
            "lockstep counts",
            decode(i for i in own_labels if i >= 0)[-3:],
            "TRL counts",
            decode(i for i in labels if i >= 0)[-3:],
        )
        print("  TRL has beyond Lockstep's tokens:", decode(ids[len(own) :]), "and the rest is the same:", ids[: len(own)] == own)
    for name, rows in (("Lockstep", ours), ("TRL", theirs)):
        count = sum(sum(label >= 0 for label in labels) for _, labels in rows)
        print(name, "counts", count, "tokens; mean loss", round(sum(loss(trainer.model, *row) for row in rows) / count, 5))


@torch.no_grad()
def loss(model, ids: list[int], labels: list[int]) -> float:
    """Summed over the counted tokens."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
