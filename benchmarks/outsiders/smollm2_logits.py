"""SmolLM2-135M on each of Lockstep's networks against transformers: log-probabilities, entropies, greedy continuations.

In the project's own environment, with the folder that benchmarks/smollm2.py writes:

    python benchmarks/outsiders/smollm2_logits.py models/smollm2 [RESULT.json]

The text is Python's own reference manual as `help()` shows it (pydoc_data.topics: prose and code that comes with Python).
Passages are of different lengths and each is cut somewhere into prompt and response, so that Lockstep's rows are padded on
the left and on the right. transformers takes one row at a time, without padding.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lockstep.config.schema import parse
from lockstep.registry import registry
from lockstep.text.sequences import Sequences, left_pad, pack
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig

TOPICS = (
    "assert",
    "booleans",
    "class",
    "comparisons",
    "exceptions",
    "for",
    "import",
    "lambda",
    "naming",
    "numbers",
    "try",
    "with",
)
BACKENDS = {
    "torch": {"device": "cpu", "precision": "float32", "threads": 2},
    "jax": {"device": "cpu", "precision": "float32", "compilation_cache": None},
}
NEW_TOKENS, PAD = 48, "<|pad|>"


def main(folder: Path, result: Path | None) -> None:
    tokenizer = Tokenizer.load(folder, TokenizerConfig(None, None, PAD, None))
    passages = [tokenizer.encode(topics[name])[20 : 20 + 60 + 11 * i] for i, name in enumerate(TOPICS)]
    cuts = [8 + (17 * i) % 47 for i in range(len(passages))]
    prompts = [p[:c] for p, c in zip(passages, cuts, strict=True)]
    responses = [p[c:] for p, c in zip(passages, cuts, strict=True)]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [transformers_row(hf, p, c) for p, c in zip(passages, cuts, strict=True)]
    continuations = [transformers_greedy(hf, p, tokenizer.eos_id) for p in prompts]
    entropies = np.concatenate([entropy for _, entropy in expected])
    found = {
        "versions": {n: version(n) for n in ("torch", "jax", "transformers")} | {"python": platform.python_version()},
        "text": f"{sum(map(len, passages))} tokens in {len(passages)} passages; {sum(map(len, responses))} compared",
        "mean_logprob": float(np.mean(np.concatenate([logprobs for logprobs, _ in expected]))),
        "mean_entropy": float(np.mean(entropies)),
        "networks": {},
    }
    sequences = pack(prompts, responses, tokenizer.pad_id)
    found["networks"]["transformers, padded, float32"] = differences(transformers_block(hf, sequences), expected)
    del hf
    for backend_name, policy_name in (("torch", "huggingface"), ("torch", "decoder"), ("jax", "huggingface")):
        cls = registry().resolve("backend", backend_name, backend_name)
        backend = cls(parse(cls.Config, BACKENDS[backend_name], "backend"))
        policy = registry().resolve("policy", policy_name, backend_name).load(folder, backend)
        out = policy.evaluate(sequences, ["logprobs", "entropy"])
        tokens, mask = left_pad(prompts, tokenizer.pad_id, max(map(len, prompts)))
        seeds = np.zeros((len(prompts), NEW_TOKENS), np.uint32)
        generated = policy.generate(tokens, mask, seeds, temperature=0.0, stop_ids=[tokenizer.eos_id], pad_id=tokenizer.pad_id)
        own = [row[counts].tolist() for row, counts in zip(generated.tokens, generated.mask, strict=True)]
        found["networks"][f"{backend_name}/{policy_name}"] = differences(out, expected) | {
            "greedy_rows_equal": sum(a == b for a, (b, _) in zip(own, continuations, strict=True)),
            "greedy_rows": len(own),
            "greedy_tokens": sum(map(len, own)),
            "where_they_part": [parting(a, b, gaps) for a, (b, gaps) in zip(own, continuations, strict=True) if a != b],
        }
        print(backend_name, policy_name, json.dumps(found["networks"][f"{backend_name}/{policy_name}"]), flush=True)
    found["smallest_greedy_gap"] = min(min(gaps) for _, gaps in continuations)
    print(json.dumps(found, indent=1))
    if result:
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def differences(out: dict[str, np.ndarray], expected: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    found = {}
    for k, name in enumerate(("logprobs", "entropy")):
        apart = np.concatenate([np.abs(out[name][i, : len(row[k])] - row[k]) for i, row in enumerate(expected)])
        found |= {f"{name}_largest_difference": float(apart.max()), f"{name}_mean_difference": float(apart.mean())}
    return found


@torch.no_grad()
def transformers_block(hf, sequences: Sequences) -> dict[str, np.ndarray]:
    """The same model on the padded rows, in float32 to the end: how far it is from itself."""
    mask = torch.tensor(sequences.attention_mask)
    ids = torch.tensor(sequences.tokens.astype(np.int64)).where(mask, 0)
    logits = hf(ids, attention_mask=mask.long(), position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits
    logprobs = logits[:, sequences.prompt_length - 1 : -1].log_softmax(-1)
    taken = logprobs.gather(-1, ids[:, sequences.prompt_length :, None])[..., 0]
    return {"logprobs": taken.numpy(), "entropy": -(logprobs.exp() * logprobs).sum(-1).numpy()}


@torch.no_grad()
def transformers_row(hf, ids: list[int], cut: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token from ``cut`` on, and the entropy it was drawn with; in float64 after the logits."""
    logprobs = hf(torch.tensor([ids])).logits[0, cut - 1 : -1].double().log_softmax(-1)
    taken = logprobs.gather(-1, torch.tensor(ids[cut:])[:, None])[:, 0]
    return taken.numpy(), -(logprobs.exp() * logprobs).sum(-1).numpy()


@torch.no_grad()
def transformers_greedy(hf, prompt: list[int], eos: int) -> tuple[list[int], list[float]]:
    """The continuation by ``generate``, and by how much each of its tokens led the second choice, in nats."""
    out = hf.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=eos, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    top = [logits[0].topk(2).values for logits in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [float(t[0] - t[1]) for t in top]


def parting(own: list[int], theirs: list[int], gaps: list[float]) -> dict:
    at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
    return {"token": at, "gap_of_first_and_second_choice": gaps[at] if at < len(gaps) else None}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
