"""A policy's `generate`, served by an engine.

    policy ──weights, if they changed──> engine        a folder, and a version: the digest of the weights
    prompts, seeds ────────────────────> engine ──> tokens, log-probabilities, the version that drew them

`Served.policy` wraps a policy so that the engine draws its samples. Every answer is checked: one drawn with other weights, of
another shape, or with impossible log-probabilities is an error. So a wrong sample never trains anything.

One step ahead. With ``engine.ahead``, the responses of step n + 1 are requested before step n's first update, and drawn while
step n trains, with the weights that step n started from (Noukhovitch et al. 2024, 'Asynchronous RLHF', arXiv 2410.18252). The
call in flight is recognised by its content, so the numbers are the same whatever the timing. A checkpoint waits for the call in
flight and stores its answer. The answer is smaller than the weights that drew it, and resuming from it is exact even if the
engine never draws the same tokens twice.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, EngineFailed, listing, short
from lockstep.interfaces import Engine, Generated, Policy
from lockstep.learning.aside import Aside
from lockstep.processes import ALONE, Processes
from lockstep.storage.weights import read_tensors, write_tensors

LARGEST_LOGPROB = 1e-3
"""The largest log-probability accepted: rounding may put one slightly above 0."""
AHEAD = "ahead.safetensors"
"""The file in a checkpoint that holds the answer to the call in flight."""


@dataclass(frozen=True)
class EngineConfig:
    """The settings of every engine; an engine's own configuration extends them. A group ``server`` in it says where the engine
    is, and is not part of a stage's identity."""

    ahead: bool = setting(
        False, "Draw the next step's responses while a step trains, with weights that are one step old (Noukhovitch et al. 2024)."
    )


@dataclass
class Flight:
    """A call in flight: ``key`` is the digest of its content, ``version`` that of the weights that draw. ``wait`` returns the
    answer, or raises what the call raised."""

    key: str
    version: str
    wait: Callable[[], Generated]


class Served:
    """An engine that draws the samples of one stage.

    Args:
      folder: where checkpoints are written for the engine, on a disk that it can read.
    """

    def __init__(self, engine: Engine, folder: Path, processes: Processes = ALONE):
        self.engine, self.folder, self.processes = engine, folder, processes
        self.version: str | None = None
        """The version of the weights that the engine has; None before it has any."""
        self.flight: Flight | None = None
        self.drawn_by: str | None = None
        """The version that drew the latest samples; ``behind`` is 1 if they were drawn one step ahead, else 0."""
        self.behind = 0

    @property
    def ahead(self) -> bool:
        return bool(self.engine.config.ahead)

    def policy(self, policy: Policy) -> ServedPolicy:
        """``policy``, with its samples drawn by the engine."""
        return ServedPolicy(policy, self)

    def hand_over(self, policy: Policy) -> str:
        """Give the engine the policy's weights, unless it has them. Return their version."""
        version = digest(policy)
        if version == self.version:
            return version
        self.version = None  # until the engine has them
        try:
            self.processes.together(lambda: policy.save(self.folder))
            self.processes.share(lambda: self._give(version))
        finally:
            if self.processes.leads:
                shutil.rmtree(self.folder, ignore_errors=True)
        self.version = version
        return version

    def _give(self, version: str) -> None:
        if not (self.folder / "config.json").exists():
            raise ConfigError(
                "An engine takes whole checkpoints, and this policy saves an adapter. Set engine=null, or train all weights: "
                "policy=huggingface."
            )
        self.engine.load(self.folder, version)

    def begin(self, policy: Policy, call: Call) -> None:
        """Start a call with the current weights; a later `draw` takes its answer."""
        version = self.hand_over(policy)
        ask = self._asking(call, version)
        self.flight = Flight(call.key, version, Aside(ask, "engine").result if self.processes.leads else ask)

    def draw(self, policy: ServedPolicy, call: Call) -> Generated:
        """The answer of the call in flight, if it is this call; without one, draw now.

        Raises:
          ConfigError: another call is in flight.
        """
        if self.flight is not None and self.flight.key == call.key:
            found, self.drawn_by, self.behind = self._land(self.flight), self.flight.version, 1
            self.flight = None
            return found
        if self.flight is not None:
            raise ConfigError(
                "engine.ahead asked for the next prompts in their order, and the algorithm now samples from others. Set "
                "engine.ahead=false."
            )
        self.drawn_by, self.behind = policy.version, 0
        return self._shared(self._asking(call, policy.version))

    def _asking(self, call: Call, version: str) -> Callable[[], Generated]:
        """A function that makes the call, for process 0."""
        return lambda: checked(*self.engine.generate(*call.given, **call.how), call, version)

    def _land(self, flight: Flight) -> Generated:
        """Wait for the answer of a call in flight, and keep it."""
        found = self._shared(flight.wait)
        flight.wait = lambda: found
        return found

    def _shared(self, ask: Callable[[], Generated]) -> Generated:
        def plain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            found = ask()
            return found.tokens, found.mask, found.logprobs

        return Generated(*self.processes.share(plain))

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Write the answer of the call in flight, if there is one.

        Raises:
          EngineFailed: the call failed. The checkpoint would not hold the weights needed to repeat it.
        """
        if self.flight is None:
            return
        found = self._land(self.flight)
        if self.processes.leads:
            arrays = {"tokens": found.tokens, "mask": found.mask.astype(np.uint8), "logprobs": found.logprobs}
            names = {name: np.frombuffer(bytes.fromhex(getattr(self.flight, name)), np.uint8) for name in ("key", "version")}
            write_tensors(folder / AHEAD, arrays | names)

    def restore(self, folder: Path) -> None:
        """Read the answer that `save` wrote, if it wrote one."""
        self.flight = None
        if (folder / AHEAD).exists():
            arrays = read_tensors(folder / AHEAD)
            found = Generated(arrays["tokens"], arrays["mask"].astype(bool), arrays["logprobs"])
            self.flight = Flight(arrays["key"].tobytes().hex(), arrays["version"].tobytes().hex(), lambda: found)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of `Policy.generate`."""

    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    seeds: np.ndarray
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int

    @property
    def given(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.prompt_tokens, self.prompt_mask, self.seeds

    @property
    def how(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "stop_ids": self.stop_ids, "pad_id": self.pad_id}

    @property
    def key(self) -> str:
        """A digest of the arguments: equal for equal calls only."""
        found = hashlib.sha256(f"{sorted(self.how.items())} {self.vocab_size}".encode())
        for array in self.given:
            found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


class ServedPolicy:
    """A policy whose samples an engine draws. The engine gets the weights at the first draw."""

    def __init__(self, policy: Policy, served: Served):
        self.policy, self.served = policy, served

    @functools.cached_property
    def version(self) -> str:
        """The version of the policy's weights, which are handed to the engine on first access."""
        return self.served.hand_over(self.policy)

    def call(self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, **how: Any) -> Call:
        how["stop_ids"] = tuple(map(int, how["stop_ids"]))
        return Call(prompt_tokens, prompt_mask, seeds, **how, vocab_size=self.policy.vocab_size)

    def generate(self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, **how: Any) -> Generated:
        """See `lockstep.interfaces.Policy.generate`.

        Raises:
          EngineFailed: the engine returned no usable tokens.
        """
        return self.served.draw(self, self.call(prompt_tokens, prompt_mask, seeds, **how))

    def begin(self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, **how: Any) -> None:
        """Start the call with the current weights; `generate` with equal arguments takes its answer."""
        self.served.begin(self.policy, self.call(prompt_tokens, prompt_mask, seeds, **how))


def digest(policy: Policy) -> str:
    """SHA-256 of the weights, which engines use as their version."""
    found = hashlib.sha256()
    for name, array in policy.arrays():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def checked(found: Generated, versions: frozenset[str], call: Call, version: str) -> Generated:
    """Return the answer.

    Raises:
      EngineFailed: it is not an answer to this call, drawn with the weights of this version.
    """
    if versions != {version}:
        raise EngineFailed(
            f"The engine was given the weights {version[:12]} and drew with {listing(short(each, 12) for each in versions)}. Let "
            "one run at a time use it, or start another on another port, and rerun the same command to resume."
        )
    tokens, mask, logprobs = found.tokens, found.mask, found.logprobs
    stops = np.isin(tokens, call.stop_ids) & mask
    lengths = mask.sum(axis=1)
    wrong = {
        f"its answer is {tokens.shape}, the seeds {call.seeds.shape}": {tokens.shape, mask.shape, logprobs.shape}
        != {call.seeds.shape},
    }
    if not any(wrong.values()):
        columns = np.arange(tokens.shape[1])
        ended = stops.any(axis=1) | (lengths == tokens.shape[1])
        inside = stops & (columns < lengths[:, None] - 1)
        read = tokens[mask]
        wrong |= {
            f"a token is not from 0 to {call.vocab_size - 1}": bool(((read < 0) | (read >= call.vocab_size)).any()),
            "a response is empty, or has a gap": bool((mask != (columns < lengths[:, None])).any() or (lengths == 0).any()),
            "a response goes on after the token that ends it": bool(inside.any()),
            "a response ends before its limit, with no token that ends it": not ended.all(),
            "a log-probability is not finite": not np.isfinite(logprobs[mask]).all(),
            "a log-probability is above 0": bool((logprobs[mask] > LARGEST_LOGPROB).any()),
        }
    if reasons := [reason for reason, holds in wrong.items() if holds]:
        raise EngineFailed(
            f"The engine's answer cannot be samples of the policy: {'; '.join(reasons)}. Look at its log, restart it, and rerun "
            "the same command to resume."
        )
    return found
