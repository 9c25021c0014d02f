"""Runs inside vLLM: draws every token as Lockstep's backends do, from the row's own seeds.

    vllm serve ... --logits-processors lockstep_vllm.processor:Seeds --logprobs-mode processed_logits

A request has vLLM's temperature 0 and the extra arguments ``{"lockstep": {"seeds": [...], "temperature": 0.7}}``. It gets the
token argmax(logits / temperature + noise of its seed). Every other logit becomes -inf, and the token's own logit becomes its
log-probability at that temperature. vLLM takes the largest logit and, with the mode ``processed_logits``, returns it: so it
answers with both. Requests without these arguments are left alone.

Needs vLLM's V1 model runner (``VLLM_USE_V2_MODEL_RUNNER=0``): the V2 runner has another interface.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from lockstep_torch.generation import sample

KEY = "lockstep"
PROBE = -1234.5
"""The log-probability of token 0 in the answer to a request with ``{"probe": true}``: proof that this code runs and that its
numbers come back untouched."""


class Row(NamedTuple):
    """A request's seeds as int32 [T], its temperature, its tokens so far (vLLM appends to this list), whether it is a probe."""

    seeds: np.ndarray
    temperature: float
    drawn: list[int]
    probe: bool


class Seeds(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        asked = (sampling_params.extra_args or {}).get(KEY)
        if asked is None:
            return
        if sampling_params.temperature != 0 or len(asked["seeds"]) < (sampling_params.max_tokens or 0):
            raise ValueError("a request with lockstep's seeds needs temperature 0 and a seed for each of its tokens")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, drawn in batch_update.added:
            self.rows.pop(index, None)
            if asked := (params.extra_args or {}).get(KEY):
                seeds = np.array(asked["seeds"], np.uint32).view(np.int32)
                self.rows[index] = Row(seeds, float(asked["temperature"]), drawn, bool(asked.get("probe")))
        for one, other, way in batch_update.moved:
            moving, replaced = self.rows.pop(one, None), self.rows.pop(other, None)
            if moving is not None:
                self.rows[other] = moving
            if way == MoveDirectionality.SWAP and replaced is not None:
                self.rows[one] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = {index: row for index, row in self.rows.items() if index < len(logits) and len(row.drawn) < len(row.seeds)}
        for temperature in {row.temperature for row in rows.values()}:
            mine = [index for index, row in rows.items() if row.temperature == temperature]
            seeds = torch.tensor(np.array([rows[i].seeds[len(rows[i].drawn)] for i in mine]), device=logits.device)
            where = torch.tensor(mine, device=logits.device)
            token, logprob = sample(logits[where].float(), seeds, temperature)
            probe = torch.tensor([rows[i].probe for i in mine], device=logits.device)
            token, logprob = torch.where(probe, 0, token), torch.where(probe, PROBE, logprob)
            logits[where] = -torch.inf
            logits[where, token] = logprob.to(logits.dtype)
        return logits


class Weights:
    """For ``--worker-extension-cls``: methods that vLLM adds to its workers."""

    def lockstep_load(self, folder: str) -> None:
        """Load the weights of a checkpoint. vLLM 0.32's own reload does not update a head that is tied to the embedding if the
        head keeps a copy in its own layout (on CPUs, packed for oneDNN)."""
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        head = getattr(worker.get_model(), "lm_head", None)
        if (method := getattr(head, "quant_method", None)) is not None:
            method.process_weights_after_loading(head)
