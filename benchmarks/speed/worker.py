"""What every contestant shares: the models' sizes, the work, and the wire to the driver. Standard library only, because each
contestant runs in an environment of its own.

A contestant is a process. It warms up, says it is ready, and then does the work once per line it reads, so that `run.py` can
have all of them take turns on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """A Llama-shaped decoder with tied embeddings."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        head = self.hidden_size // self.heads
        attention = self.hidden_size * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    def forward_flops(self, rows: int, columns: int, scored: int) -> float:
        """Of one pass over [rows, columns] with logits at ``scored`` columns: two per weight and position, and the two
        products of attention over the full square, as everybody computes it."""
        attention = 4 * self.layers * self.hidden_size * columns**2 * rows
        return 2.0 * rows * (columns * self.layer_weights + scored * self.head_weights) + attention


SIZES = {
    "tiny": Size(4, 128, 4, 4, 512, 512),
    "miniature": Size(4, 128, 4, 4, 384, 211),
    **{f"width{d}": Size(4, d, d // 32, d // 32, 4 * d, 512) for d in (64, 256, 512)},  # for growth.py; tiny is 128 wide
    "grouped": Size(4, 256, 8, 2, 512, 512),  # for gpu_checks.py: heads share keys
    "smollm2": Size(30, 576, 9, 3, 1536, 49152),
    "0.1b": Size(30, 576, 9, 3, 1536, 49152),  # of random weights, for gpu.py
    "0.6b": Size(28, 1024, 16, 8, 3072, 151936),
    "1.5b": Size(28, 1536, 12, 2, 8960, 151936),
}


@dataclass(frozen=True)
class Work:
    """One unit of work, the same for all contestants: what is done once per turn.

    ``rows`` of ``prompt`` + ``response`` tokens; for PPO and GRPO with ``epochs`` inner epochs of one minibatch; for the
    reward model and GRPO ``completions`` of each prompt, all of them rows.
    """

    task: str  # generate, sft, reward, ppo or grpo
    size: str
    rows: int
    prompt: int
    response: int
    epochs: int = 1
    completions: int = 2

    @property
    def tokens(self) -> int:
        """Tokens that the figure counts: generated ones, or positions passed through the model once."""
        return self.rows * (self.response if self.task in ("generate", "ppo", "grpo") else self.prompt + self.response)

    @property
    def flops(self) -> float:
        """Of the work as the algorithm states it, without anything computed twice; backward is twice forward. PPO: prefill
        and decode, one evaluation each of policy, reference, value and reward model, then ``epochs`` x forward and backward
        of policy and value network. GRPO: one evaluation of the reference; the only epoch's forward pass gives the old
        log-probabilities."""
        size, columns = SIZES[self.size], self.prompt + self.response
        policy = size.forward_flops(self.rows, columns, self.response)
        trunk = size.forward_flops(self.rows, columns, 0)
        return {
            "generate": policy,
            "sft": 3 * size.forward_flops(self.rows, columns, columns - 1),
            "reward": 3 * trunk,
            "ppo": policy + 2 * policy + 2 * trunk + 3 * self.epochs * (policy + trunk),
            "grpo": policy + policy + 3 * self.epochs * policy,
        }[self.task]

    def bytes(self, precision: str) -> float:
        """Least traffic of decoding: all weights once per token step, and the KV cache as it grows."""
        size, each = SIZES[self.size], 4 if precision == "float32" else 2
        weights = each * (size.layer_weights + size.head_weights) * self.response
        head = size.hidden_size // size.heads
        per_column = each * 2 * size.layers * size.kv_heads * head * self.rows
        return weights + per_column * sum(range(self.prompt, self.prompt + self.response))


WORK = {
    "generate/tiny": Work("generate", "tiny", 64, 32, 32),
    "generate/smollm2": Work("generate", "smollm2", 8, 32, 32),
    "sft/tiny": Work("sft", "tiny", 64, 1, 63),
    "sft/smollm2": Work("sft", "smollm2", 8, 1, 127),
    "reward/tiny": Work("reward", "tiny", 64, 32, 32),
    "reward/smollm2": Work("reward", "smollm2", 8, 32, 32),
    "ppo/tiny": Work("ppo", "tiny", 64, 32, 32, epochs=4),
    "ppo/miniature": Work("ppo", "miniature", 64, 28, 20, epochs=4),
    "ppo/smollm2": Work("ppo", "smollm2", 8, 32, 32, epochs=2),
    "grpo/tiny": Work("grpo", "tiny", 64, 32, 32, completions=8),
    "grpo/smollm2": Work("grpo", "smollm2", 8, 32, 32, completions=4),
}

WORDS = 200
"""Words of the benchmark's tokenizer: ids 0 .. 199, in every model's vocabulary."""


def texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of exactly so many tokens."""
    import random

    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(words)) for _ in range(count)]


def rule(ids: Sequence[int]) -> float:
    """The reward of a response, for GRPO: as cheap as one can be."""
    return sum(token % 2 for token in ids) / len(ids)


class Contestant:
    """The wire: answers go to what was standard output, anything that libraries print goes to standard error."""

    def __init__(self) -> None:
        self.wire = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        spec = json.loads(sys.argv[1])
        self.work: Work = Work(**spec["work"])
        self.options: dict[str, Any] = spec["options"]
        self.device: str = spec["device"]
        self.models = Path(spec["models"])
        self.started = 0.0
        self.wait: Callable[[], Any] = lambda: None
        """For the device to finish."""
        self.peak_bytes: Callable[[], int | None] = lambda: None
        """Of the device's memory, since the process began; None on the CPU."""

    def await_turn(self) -> str:
        """Blocks until the driver asks for the next unit of work; what it said."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
        self.started = time.perf_counter()
        return line.strip()

    def finished(self, **facts: Any) -> None:
        """One unit of work is done."""
        self.wait()
        seconds = time.perf_counter() - self.started
        peak = self.peak_bytes()
        mib = peak_mib() if peak is None else peak / 2**20
        self.wire.write(json.dumps({"seconds": seconds, "peak_mib": mib, **facts}) + "\n")

    def ready(self, **versions: str) -> None:
        self.wire.write(json.dumps({"ready": versions}) + "\n")

    def serve(self, step: Callable[[], Any], profile: Callable[[Callable[[], Any]], str] | None = None, **versions: str) -> None:
        """``profile`` is asked for by 'profile': a text about one step."""
        for _ in range(2):
            step()
        self.ready(**versions)
        while True:
            if self.await_turn() == "profile":
                self.wire.write(json.dumps({"profile": profile(step) if profile else ""}) + "\n")
                continue
            step()
            self.finished()


def multiplies_bfloat16(device: str) -> bool:
    """Whether it has instructions for it: CPUs without them take a hundred times as long in PyTorch as for float32."""
    if device == "cuda":
        return True
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[-1].split("\n", 1)[0].split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def peak_mib() -> float:
    """Most resident memory of this process since the turn began."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")
