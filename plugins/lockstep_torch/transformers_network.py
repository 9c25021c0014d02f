"""Any causal language model of transformers behind the interface of `lockstep_torch.network.Network`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lockstep.errors import CheckpointError, ConfigError
from lockstep.interfaces import Past
from lockstep.models.architecture import usual_name
from lockstep.storage.hub import hub
from lockstep_torch.attention import Layout, RealFirst
from lockstep_torch.decoder import recalled
from lockstep_torch.network import DropoutMask, Network, positions

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""The names of the context length in transformers' configurations."""


def config_of(hf: Any) -> dict[str, Any]:
    """``config.json`` of a model of transformers, without the folder that it was read from."""
    return {key: value for key, value in hf.config.to_dict().items() if key != "_name_or_path"}


def load(auto: Any, source: Path | str) -> tuple[Any, dict[str, Any]]:
    """Load a model of transformers in float32, from safetensors only and without running code from the checkpoint. Also returns
    the names that the checkpoint lacks, where transformers draws random numbers ('missing_keys'); the names that the model lacks
    ('unexpected_keys'); and, where shapes differ, {name: (shape in the checkpoint, shape in the model)} ('mismatched_keys').

    Raises:
      CheckpointError: transformers cannot open it.
    """
    how: dict[str, Any] = {"dtype": "float32", "use_safetensors": True, "ignore_mismatched_sizes": True}
    with _opening(source) as config:
        model, info = auto.from_pretrained(source, config=config, trust_remote_code=False, output_loading_info=True, **how)
    return model, {**info, "mismatched_keys": {name: (there, here) for name, there, here in info["mismatched_keys"]}}


def without_weights(auto: Any, source: Path | str) -> Any:
    """The model that `load` would open, with parameters that have shapes but no memory.

    Raises:
      CheckpointError: transformers cannot open it.
    """
    with _opening(source) as config, _no_memory():
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)


@contextlib.contextmanager
def _opening(source: Path | str) -> Iterator[Any]:
    """Yield transformers' configuration of a checkpoint. Any error inside becomes a CheckpointError."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its table of unexpected keys names a scalar head that is loaded elsewhere
    logging.disable_progress_bar()
    with hub(source) as why:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            for part in (config, config.get_text_config()):
                pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
                if pad is not None and rows is not None and not 0 <= pad < rows:
                    part.pad_token_id = None  # outside the embedding, where torch refuses it; nothing here reads it
            yield config
        except Exception as error:  # of many types: each part of transformers raises its own
            raise CheckpointError(f"'{source}' cannot be opened as a checkpoint: {why(error)}") from error


@contextlib.contextmanager
def _no_memory() -> Iterator[None]:
    """Put the parameters of modules that are created inside on the device 'meta'. Buffers stay where they are: many are computed
    once and are in no checkpoint."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a meta parameter may also belong to another module, so it stays
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _without_dropout(hf: Any) -> None:
    """Take dropout out of modules that apply it by themselves: whether they do follows their ``training``, which
    `TransformersNetwork._checkpointing_layers` sets."""
    for module in hf.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def ropes(config: Any) -> list[dict[str, Any]]:
    """The records of rope parameters in transformers' configuration: one, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [each for each in (found, *found.values()) if isinstance(each, dict)]


def context_of(config: Any) -> int:
    """The context length in transformers' configuration; without a limit there, as in Bloom's, there is none. With longrope it is
    the original one: in longer batches, transformers takes other frequencies for all rows. With dynamic rope the same begins at
    max_position_embeddings."""
    named = [limit for key in CONTEXTS if (limit := getattr(config, key, None)) is not None]
    original = [each["original_max_position_embeddings"] for each in ropes(config) if each.get("rope_type") == "longrope"]
    return min([*named[:1], *original], default=sys.maxsize)


class TransformersNetwork(Network):
    """Any causal language model of transformers, or its trunk alone."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf
        self.logit_scale = 1.0
        """What transformers multiplies this model's logits by; `find_logit_scale` finds it."""
        _without_dropout(hf)
        # If config.json has a pad_token_id, often that of EOS, transformers gives that token's embedding no gradient.
        hf.get_input_embeddings().padding_idx = None
        self.config = config_of(hf)
        self.prefix = "" if hf.base_model is not hf else f"{hf.base_model_prefix}."  # as in the checkpoint
        config = hf.config.get_text_config()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.context_length = context_of(config)

    def checkpoint_name(self, name: str) -> str:
        return usual_name(self.config["model_type"], name.replace("hf.", self.prefix, 1))

    def hidden(
        self, tokens: Tensor, mask: Tensor, dropout: DropoutMask | None = None, first: int = 0, layout: Layout | None = None
    ) -> Tensor:
        if dropout is not None:
            raise ConfigError("Networks of transformers run without dropout. Set dropout=0, or use policy=decoder.")
        if mask.dtype != torch.bool and not self.can_pack:
            raise ConfigError(
                f"This {self.config['model_type']} cannot be trained on packed rows: in transformers, the examples of a row see "
                "each other. Set packing=false."
            )
        real_first = RealFirst.of(mask) if self.in_order(mask.shape[1]) else None
        with self._checkpointing_layers():
            if real_first is None:
                return self._trunk(tokens, mask, positions(mask)).last_hidden_state[:, first:]
            x = self._trunk(real_first.ordered(tokens), real_first.ordered(mask), None).last_hidden_state
            return real_first.restored(x, first)

    def start(self, tokens: Tensor, mask: Tensor, new_tokens: int, past: Past | None = None) -> tuple[Tensor, dict[str, Any]]:
        known, before = 0, None
        if past is not None:
            from transformers import DynamicCache

            known, before, layers = past.known, DynamicCache(), past.cache["past"].layers
            kept = recalled(past, [layer.keys for layer in layers] + [layer.values for layer in layers])
            for number in range(len(layers)):
                before.update(kept[number], kept[len(layers) + number], number)
        out = self._trunk(tokens[:, known:], mask, positions(mask)[:, known:], past_key_values=before, use_cache=True)
        return out.last_hidden_state[:, -1], {"past": out.past_key_values, "mask": mask, "count": mask.sum(-1)}

    def repeated(self, cache: dict[str, Any], times: int) -> dict[str, Any] | None:
        """The repeated cache; None if a layer keeps a state besides its keys and values or instead of them, which transformers
        does not repeat."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if any(type(each) not in (DynamicLayer, DynamicSlidingWindowLayer) for each in getattr(cache["past"], "layers", [None])):
            return None
        cache["past"].batch_repeat_interleave(times)
        mask, count = (cache[name].repeat_interleave(times, 0) for name in ("mask", "count"))
        return {"past": cache["past"], "mask": mask, "count": count}

    def kept(self, cache: dict[str, Any]) -> Any:
        """The cache; None if a layer keeps a window or a state instead of all keys and values."""
        from transformers.cache_utils import DynamicLayer

        layers = getattr(cache["past"], "layers", [None])
        return cache if all(type(layer) is DynamicLayer for layer in layers) else None

    def advance(self, token: Tensor, cache: dict[str, Any]) -> Tensor:
        cache["mask"] = F.pad(cache["mask"], (0, 1), value=True)
        out = self._trunk(token[:, None], cache["mask"], cache["count"][:, None], past_key_values=cache["past"], use_cache=True)
        cache["past"], cache["count"] = out.past_key_values, cache["count"] + 1
        return out.last_hidden_state[:, 0]

    def check_cache(self) -> None:
        """
        Raises:
          CheckpointError: transformers caches something else of this model than keys and values.
        """
        if "past_key_values" not in inspect.signature(self.hf.base_model.forward).parameters:
            raise CheckpointError(
                f"Lockstep cannot sample from this {self.config['model_type']}: transformers caches a state of it, not keys and "
                "values. Take a model with attention; hybrids such as bamba and falcon_h1 work."
            )

    def find_logit_scale(self) -> None:
        """Find the factor that transformers applies to this model's logits: families give it names of their own, such as
        logits_scaling. The network must have its weights.

        Raises:
          CheckpointError: it is no value of config.json nor the inverse of one, so transformers computes logits in another way.
        """
        device = self.hf.get_input_embeddings().weight.device
        tokens = torch.arange(1, 9, device=device)[None] * 5 % self.vocab_size
        with torch.no_grad():
            wanted = self.hf(input_ids=tokens, use_cache=False).logits
            hidden = self._trunk(tokens, torch.ones_like(tokens, dtype=torch.bool), None).last_hidden_state
            known = [v for v in self.hf.config.get_text_config().to_dict().values() if type(v) in (int, float) and v]
            for self.logit_scale in (1.0, *known, *(1 / v for v in known)):
                if torch.allclose(self.logits(hidden), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
                    return
        raise CheckpointError(
            f"The logits of this {self.config['model_type']} are computed in a way that Lockstep does not know. It would train "
            "another model than transformers runs."
        )

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.hf.get_output_embeddings()(hidden)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]

    def language_head(self) -> nn.Module | None:
        return self.hf.get_output_embeddings()

    def without_language_head(self) -> TransformersNetwork:
        trunk = TransformersNetwork(self.hf.base_model)
        trunk.adapter = self.adapter
        return trunk

    def in_order(self, columns: int) -> bool:
        """True if rows with real tokens first need no mask: transformers then makes none for layers that see all earlier keys.
        Positions then run to the last column, so each column must have one, and angles may not depend on the longest row."""
        kinds = {each.get("rope_type") for each in ropes(self.hf.config.get_text_config())}
        return columns <= self.context_length and not kinds & {"dynamic", "longrope"}

    @functools.cached_property
    def can_pack(self) -> bool:
        """True if examples in one row are independent. transformers marks examples by positions that start over, which not every
        model respects. So this compares an example alone with the same example after two different others."""
        device = self.hf.get_input_embeddings().weight.device
        first, second = (torch.arange(8, device=device)[None] * step % self.vocab_size for step in (1, 3))
        segments = torch.tensor([[1] * 8 + [2] * 8], device=device)
        run = lambda tokens, mask: self._trunk(tokens, mask, positions(mask)).last_hidden_state[0, -8:]  # noqa: E731
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            alone = run(second, segments[:, :8] > 0)
            packed, other = (run(torch.cat([before, second], 1), segments) for before in (first, first.flip(1)))
        return torch.equal(packed, other) and torch.allclose(packed, alone, atol=1e-3 * float(alone.abs().max()))

    @contextlib.contextmanager
    def _checkpointing_layers(self) -> Iterator[None]:
        """transformers checkpoints layers only in training mode. So the layers claim to be in it, while the modules inside them,
        including dropout, are not."""
        again = functools.partial(checkpoint, use_reentrant=False)
        layers: Any = self.layers() if self.gradient_checkpointing else []
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer.training = True, again, True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _trunk(self, tokens: Tensor, mask: Tensor, position: Tensor | None, **cache: Any) -> Any:
        """Run the trunk. If ``position`` is None, positions are column numbers, and each column sees all earlier ones."""
        here = mask[:, -tokens.shape[1] :] != 0
        return self.hf.base_model(
            input_ids=torch.where(here, tokens, 0),
            attention_mask=mask.long() if mask.dtype == torch.bool and position is not None else None,
            position_ids=position,
            **({"use_cache": False} | cache),
        )
