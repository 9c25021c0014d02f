"""Sequence classifiers of transformers that are not decoders (BERT, RoBERTa, DeBERTa, ...): text in, scores out, through
transformers' own forward pass and tokenizer. Torch only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.errors import CheckpointError
from lockstep.interfaces import Classifier
from lockstep.models.architecture import check_labels
from lockstep.storage.hub import hub
from lockstep.types import Message
from lockstep_torch.device import TorchDevice


class TextClassifier(Classifier):
    """An ``AutoModelForSequenceClassification`` with one label, from a folder or the hub."""

    def __init__(self, model: Any, tokenizer: Any, backend: TorchDevice):
        self.model, self.tokenizer, self.backend = model.eval().to(backend.device), tokenizer, backend
        positions = getattr(model.config, "max_position_embeddings", None)
        self.longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)

    @classmethod
    def load(cls, source: Path | str, backend: TorchDevice) -> TextClassifier:
        """
        Raises:
          CheckpointError: transformers cannot open it, the checkpoint lacks a head, or it has several labels.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        how = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        with hub(source) as why:
            try:
                model, info = AutoModelForSequenceClassification.from_pretrained(source, dtype="float32", **how)
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
                raise CheckpointError(f"'{source}' cannot be opened as a reward model: {why(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"'{source}' is not a reward model: its checkpoint has no {', '.join(missing[:3])}.")
        check_labels(source, model.config.num_labels)
        return cls(model, tokenizer, backend)

    def renderer(self, template: str | None) -> Callable[..., str] | None:
        template = template or self.tokenizer.chat_template
        return functools.partial(self._render, template) if template else None

    def _render(self, template: str, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        dialogue = [{"role": m.role, "content": m.content} for m in messages]
        settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(dialogue, chat_template=template, **settings)

    @torch.no_grad()
    def score(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> np.ndarray:
        encoded = [self._encode(text) for text in texts]
        scores = np.full(len(texts), np.nan, np.float32)
        fits = [i for i, row in enumerate(encoded) if len(row["input_ids"]) <= self.longest]
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
