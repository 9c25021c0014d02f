"""Sequence classifiers of transformers that are not decoders (BERT, RoBERTa, DeBERTa, ...): text in, scores out, through
transformers' own forward pass and tokenizer. Torch only."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.errors import CheckpointError
from lockstep.interfaces import Classifier
from lockstep.models.architecture import check_labels, refuse_tensors
from lockstep.models.checkpoint import check_files
from lockstep.storage.hub import hub
from lockstep.storage.weights import check_stored_finite
from lockstep.text import encoding, templates
from lockstep.text.tokenizer import any_of, broken_up, outside_embedding
from lockstep.types import Message
from lockstep_torch.device import TorchDevice
from lockstep_torch.transformers_network import load


def positions(model: Any) -> int | None:
    """How many positions the model has; None if its configuration does not say. RoBERTa starts counting after the padding
    position."""
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return most if most is None or padding is None else most - padding - 1


class TextClassifier(Classifier):
    """An ``AutoModelForSequenceClassification`` with one label, from a folder or the hub."""

    def __init__(self, model: Any, tokenizer: Any, backend: TorchDevice):
        self.model, self.tokenizer, self.backend = model.eval().to(backend.device), tokenizer, backend
        self.special = any_of([str(token) for token in tokenizer.added_tokens_decoder.values() if token.special])
        self.longest = min(tokenizer.model_max_length, positions(model) or tokenizer.model_max_length)

    @classmethod
    def load(cls, source: Path | str, backend: TorchDevice) -> TextClassifier:
        """
        Raises:
          CheckpointError: transformers cannot open it, the checkpoint lacks a head, it has several labels, or its tokenizer
            does not fit.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        _, _, stored = check_files(source)
        check_stored_finite(stored, f"The checkpoint '{source}'")
        model, info = load(AutoModelForSequenceClassification, source)
        inside = lambda names: {name for name in names if re.search(r"\.\d+\.", name)}  # noqa: E731  a layer, not a head
        missing, unused = info["missing_keys"], inside(info["unexpected_keys"])
        refuse_tensors(source, missing=inside(missing), unused=unused, other=info["mismatched_keys"])
        if missing:
            raise CheckpointError(f"'{source}' is not a reward model: its checkpoint has no {', '.join(sorted(missing)[:3])}.")
        check_labels(source, model.config.num_labels)
        with hub(source) as why:
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            except Exception as error:  # of many types
                raise CheckpointError(f"The tokenizer of '{source}' cannot be opened: {why(error)}") from error
        read = {tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token}
        spared = set(tokenizer.all_special_tokens) - read
        outside_embedding(tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings, f"'{source}'", spared)
        return cls(model, tokenizer, backend)

    def broken_up(self, text: str) -> str:
        return broken_up(text, self.special)

    def renderer(self, template: str | None) -> Callable[..., str] | None:
        template = template or self.tokenizer.chat_template
        return functools.partial(self._render, template) if template else None

    def _render(self, template: str, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        tokens = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return templates.render(template, messages, add_generation_prompt=add_generation_prompt, tokens=tokens)

    @torch.no_grad()
    def score(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> np.ndarray:
        most, rows = encoding.most_characters(self.longest), list[str | tuple[str, str]](texts)
        encoded = {i: self._encode(text) for i, text in enumerate(rows) if len("".join(text)) <= most}
        scores = np.full(len(texts), np.nan, np.float32)
        fits = [i for i, row in encoded.items() if len(row["input_ids"]) <= self.longest]
        if fits:
            batch = self.tokenizer.pad([encoded[i] for i in fits], return_tensors="pt").to(self.backend.device)
            with self.backend.autocast():
                scores[fits] = self.model(**batch).logits[:, 0].float().cpu().numpy()
        return scores

    def _encode(self, text: str | tuple[str, str]) -> dict[str, Any]:
        if not isinstance(text, str):
            return dict(self.tokenizer(*text))
        begun = any(token and text.startswith(token) for token in (self.tokenizer.cls_token, self.tokenizer.bos_token))
        return dict(self.tokenizer(text, add_special_tokens=not begun))  # a template may already have added them
