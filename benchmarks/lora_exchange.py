"""Train an adapter of a checkpoint on one backend, open it on the other and in peft, compare. Both ways.

    python benchmarks/lora_exchange.py models/smollm2 hh-harmless-base.jsonl.gz

Three steps of SFT on eight real comparisons' chosen answers; then log-probabilities of 16 other answers, in nats.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lockstep.config.compose import group
from lockstep.config.schema import parse
from lockstep.data.files import Files
from lockstep.interfaces import Backend, Policy
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.registry import registry
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import Sequences
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms

ADAM = OptimizerConfig(2e-4, (0.9, 0.95), 1e-8, False, 0.0, 1.0, None)
LENGTHS = Lengths(96, 48, 48)


def main(base: str, data: str) -> None:
    rows = [block(base, data, part) for part in (slice(0, 8), slice(8, 24))]
    for here, there in (("torch", "jax"), ("jax", "torch")):
        with tempfile.TemporaryDirectory() as folder:
            policy = create(backend(here), base)
            fresh = logprobs(policy, rows[1])
            train(policy, rows[0])
            policy.save(Path(folder))
            own = logprobs(policy, rows[1])
            other = logprobs(component("policy", "lora", there).load(Path(folder), backend(there)), rows[1])
            peft = of_peft(base, folder, rows[1])
        print(
            f"trained on {here}: {len(own)} tokens, moved by up to {abs(own - fresh).max():.3f}; on {there} within "
            f"{abs(other - own).max():.1e}, in peft within {abs(peft - own).max():.1e}"
        )


def component(kind: str, name: str, on: str) -> type:
    return registry().resolve(kind, name, on)


def backend(name: str) -> Backend:
    cls = component("backend", name, name)
    settings = {key: value for key, value in group("backend", name).items() if key != "name"}
    return cls(parse(cls.Config, settings | {"device": "cpu"}, "backend"))


def create(on: Backend, base: str) -> Policy:
    cls = component("policy", "lora", on.name)
    settings = {key: value for key, value in group("policy", "lora").items() if key != "name"}
    return cls.create(parse(cls.Config, settings | {"path": base}, "policy"), on, None, 0)


def block(base: str, data: str, part: slice) -> Sequences:
    tokenizer = Tokenizer.load(base, TokenizerConfig(None, None, "<|pad|>", None))
    settings = {key: value for key, value in group("data", "files").items() if key != "name"}
    source = Files(parse(Files.Config, settings | {"demonstrations": [{"path": data}], "on_bad_row": "skip"}, "data"))
    examples = encoding.encode_demonstrations(tokenizer, source.demonstrations("train")[:40], LENGTHS)
    return encoding.block(examples[part], tokenizer, LENGTHS)


def train(policy: Policy, rows: Sequences) -> None:
    learner = policy.backend.learner({"policy": policy}, {"policy": ADAM})
    for _ in range(3):
        learner.update(next_token_terms([rows], None, NextTokenLoss()))


def logprobs(policy: Policy, rows: Sequences) -> np.ndarray:
    return policy.evaluate(rows, ["logprobs"])["logprobs"][rows.mask]


def of_peft(base: str, folder: str, rows: Sequences) -> np.ndarray:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder).eval()
    mask = torch.tensor(rows.attention_mask).long()
    tokens = torch.tensor(np.where(rows.attention_mask, rows.tokens, 0)).long()
    with torch.no_grad():
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(input_ids=tokens, attention_mask=mask, position_ids=position).logits.log_softmax(-1)
    taken = found[:, rows.prompt_length - 1 : -1].gather(-1, tokens[:, rows.prompt_length :, None])[..., 0]
    return taken.numpy()[rows.mask]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
