"""Models: a network with a language head, a scalar head or both, and the quantities they supply."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lockstep.interfaces import Generated, Past, Policy, ScalarModel, check_vocabularies
from lockstep.learning import losses
from lockstep.models import adapters
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD, causal_class, classifier_class
from lockstep.processes import call_text
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_weights
from lockstep.text.sequences import Sequences, rows_per_prompt
from lockstep_torch.attention import Layout
from lockstep_torch.decoder import DecoderNetwork
from lockstep_torch.device import TorchDevice
from lockstep_torch.generation import Decoding, generate
from lockstep_torch.mesh import fill, on_host, shell
from lockstep_torch.network import DropoutMask, Network, ScalarHead, copy_network
from lockstep_torch.pieces import chosen

LOGITS_AT_ONCE = 2**26
"""Elements of logits computed at once: a quarter of a gibibyte in float32, and several times that with gradients."""
HEAD = (SCALAR_HEAD, SCALAR_BIAS)


@dataclass(frozen=True)
class Block:
    """``sequences`` on the device: tokens [B, P + T]; mask [B, P + T], bool, or int if there are segments; last [B]; and the
    layout of tokens that a network may follow."""

    sequences: Sequences
    tokens: Tensor
    mask: Tensor
    last: Tensor
    prompt_length: int
    layout: Layout | None

    @classmethod
    def put(cls, sequences: Sequences, backend: TorchDevice) -> Block:
        s, layout = sequences, None
        if s.segments is None:
            layout = Layout.of(s.attention_mask, s.prompt_length, s.rows_per_prompt, backend.device)
        tokens, mask, last = (backend.put(array) for array in (s.tokens, s.attention, s.last))
        return cls(s, tokens, mask, last, s.prompt_length, layout)


class TorchModel:
    """The shared part of `LanguageModel` and `Scalar`."""

    supplies: frozenset[str]
    teacher: TorchModel | None = None
    beta: float = 1.0

    def __init__(self, network: Network, head: ScalarHead | None, backend: TorchDevice):
        # With a mesh, FSDP moves each layer to the device before sharding it.
        self.network = network if backend.mesh is not None else network.to(backend.device)
        self.network.gradient_checkpointing = backend.config.gradient_checkpointing
        graphs = backend.config.cuda_graphs and backend.device.type == "cuda" and backend.mesh is None
        self.network.replays = graphs and isinstance(self.network, DecoderNetwork)
        self.head = None if head is None else head.to(backend.device)
        self.backend, self.mesh = backend, backend.mesh
        if self.mesh is not None:
            self.shell = shell(self.network, "meta")
            self.root = self.mesh.divide(self.network, self.head)
        self.vocab_size, self.hidden_size = network.vocab_size, network.hidden_size
        self.context_length = network.context_length

    @classmethod
    def filled(cls, network: Network, head: ScalarHead | None, backend: TorchDevice, weights: Mapping[str, np.ndarray]) -> Any:
        """A model of this network with these weights. Each process reads only its own parts of them. The network's own weights
        are dropped, so it may be on the device 'meta', without memory."""
        made = cls(shell(network, _creation_device(backend)), head, backend)
        fill({name: tensor for name, tensor in made.tensors().items() if name not in HEAD}, weights)
        return made

    def forward(
        self, block: Block, outputs: Sequence[str], temperature: float, dropout: DropoutMask | None = None
    ) -> dict[str, Tensor]:
        """The named outputs of all rows, differentiable."""
        if self.mesh is None:
            return self.run(block, outputs, temperature, dropout)
        rows = len(block.tokens)
        own = self.mesh.own(rows)
        dropout = dropout and DropoutMask(dropout.rate, dropout.seeds[torch.as_tensor(own, device=block.tokens.device)])
        part = Block.put(block.sequences.take(own), self.backend)
        found = self.root(self.run, part, outputs, temperature, dropout)
        # Sorted, because the order of a set differs between processes.
        return {name: self.mesh.gather(found[name], rows) for name in sorted(outputs)}

    def run(
        self, block: Block, outputs: Sequence[str], temperature: float, dropout: DropoutMask | None = None
    ) -> dict[str, Tensor]:
        """The named outputs of this block's rows. Logits exist only at the T columns that predict a response token."""
        with self.backend.autocast():
            first = block.prompt_length - 1
            hidden = self.network.hidden(block.tokens, block.mask, dropout, first, block.layout)  # [B, T + 1, d]
            states = hidden[:, :-1]  # [B, T, d]: the state that predicts each response token
            out = {}
            if "logprobs" in outputs or "entropy" in outputs:
                tokens = block.tokens[:, block.prompt_length :]
                out |= self.of_distribution(states, tokens, temperature, entropy="entropy" in outputs)
            if "divergence" in outputs and self.teacher is not None:
                out["divergence"] = self.from_teacher(self.teacher, states, block, temperature)
            if "values" in outputs:
                out["values"] = self.head(states)
            if "scores" in outputs:
                out["scores"] = self.head(hidden[torch.arange(len(hidden), device=hidden.device), block.last - first])
        return {name: out[name] for name in outputs}

    def of_distribution(self, states: Tensor, tokens: Tensor, temperature: float, *, entropy: bool) -> dict[str, Tensor]:
        """Log-probabilities and, if asked for, the entropy, each [B, T]."""

        def some(states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return chosen(self.network.logits(states), tokens, temperature, entropy)

        names = ("logprobs", "entropy")[: 1 + entropy]
        return dict(zip(names, self.in_pieces(some, states, tokens), strict=True))

    def from_teacher(self, teacher: TorchModel, states: Tensor, block: Block, temperature: float) -> Tensor:
        """The divergence from the teacher [B, T], given this model's states [B, T, d] that predict each response token."""
        network, call = teacher.network, teacher.call
        with torch.no_grad():
            theirs = call(network.hidden, block.tokens, block.mask, None, block.prompt_length - 1, block.layout)[:, :-1]

        def some(states: Tensor, theirs: Tensor) -> tuple[Tensor, ...]:
            own = (self.network.logits(states).float() / temperature).log_softmax(-1)
            with torch.no_grad():
                other = (call(network.logits, theirs).float() / temperature).log_softmax(-1)
            return (losses.divergence(xp, own, other, self.beta),)

        return self.in_pieces(some, states, theirs)[0]

    def call(self, method: Callable[..., Any], *given: Any) -> Any:
        """Call a method of the network from outside this model's `forward`."""
        return method(*given) if self.mesh is None else self.root(method, *given)

    def in_pieces(self, some: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Apply ``some``, which computes logits and returns arrays [B, T], to inputs [B, T, ...]. If [B, T, V] is large, it never
        exists in full: a few positions at a time are computed, and recomputed for the gradient (Chen et al. 2016)."""
        shape, at_once = inputs[0].shape[:2], max(1, LOGITS_AT_ONCE // self.vocab_size)
        if shape.numel() <= at_once:
            return some(*inputs)
        pieces = zip(*(x.flatten(0, 1).split(at_once) for x in inputs), strict=True)
        found = [checkpoint(some, *piece, use_reentrant=False) for piece in pieces]
        return tuple(torch.cat(part).view(shape) for part in zip(*found, strict=True))

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        self.backend.processes.agree("batch", sequences.tokens, sequences.attention, call_text(outputs, temperature))
        out = self.forward(Block.put(sequences, self.backend), outputs, temperature)
        return {name: value.float().cpu().numpy() for name, value in out.items()}

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters under checkpoint names: all of them, or the adapter's and the head's."""
        parameters = self.network.named_parameters()
        named = {self.network.checkpoint_name(name): tensor for name, tensor in parameters if tensor.requires_grad}
        if self.network.adapter is not None:  # peft may hold several adapters in one layer, by name
            named = {name.replace(".default.", "."): tensor for name, tensor in named.items()}
        return named | (self.head.tensors() if self.head else {})

    def parameters(self) -> dict[str, np.ndarray]:
        return dict(self.arrays())

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in self.tensors().items():
            yield name, on_host(tensor).copy()

    def copy(self):
        copied = self.rebuilt(type(self), None if self.head is None else same_head(self.head))
        copied.teacher, copied.beta = self.teacher, self.beta
        return copied

    def rebuilt(self, cls: type[Any], head: ScalarHead | None, change: Callable[[Network], Network] = lambda same: same) -> Any:
        """A model of class ``cls`` with this head and a copy of this model's network, to which ``change`` is applied."""
        if self.mesh is None:
            return cls(change(copy_network(self.network)), head, self.backend)
        made = cls(change(shell(self.shell, _creation_device(self.backend))), head, self.backend)
        mine = self.tensors()
        with torch.no_grad():
            for name, tensor in made.tensors().items():
                if name not in HEAD:
                    tensor.copy_(mine[name])
        return made

    def write(self, folder: Path, name: str, **config: int) -> None:
        """Write a checkpoint of transformers' class ``name``; for an adapted network, only the adapter. Without ``num_labels``,
        the head is left out."""
        tensors = {key: tensor for key, tensor in self.tensors().items() if config or key not in HEAD}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        gather, processes = (lambda key: on_host(tensors[key])), self.backend.processes
        if self.network.adapter is not None:
            adapters.write(folder, self.network.adapter, shapes, gather, processes, scalar=bool(config))
            return
        write_weights(folder, shapes, gather, processes)
        if processes.leads:
            write_json(folder / "config.json", {**self.network.config, "architectures": [name], **config})


class LanguageModel(TorchModel, Policy):
    """A policy on PyTorch, created by `policies.py`."""

    @property
    def supplies(self) -> frozenset[str]:
        more = {"values": self.head is not None, "divergence": self.teacher is not None}
        return frozenset({"logprobs", "entropy"} | {name for name, there in more.items() if there})

    def toward(self, teacher: Any, beta: float) -> LanguageModel:
        check_vocabularies(self, teacher)
        student = self.copy()
        student.teacher, student.beta = teacher, beta
        return student

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
        past: Past | None = None,
    ) -> Generated:
        self.backend.processes.agree("prompts", prompt_tokens, prompt_mask, seeds, call_text((), temperature))
        rows = slice(None) if self.mesh is None else self.mesh.own(len(seeds))
        prompts = prompt_tokens[rows], prompt_mask[rows]
        each = rows_per_prompt(*prompts) if past is None else 1
        given = [self.backend.put(array) for array in (prompts[0][::each], prompts[1][::each], seeds[rows])]
        how: dict[str, Any] = {"temperature": temperature, "stop_ids": stop_ids, "pad_id": pad_id, "past": past}
        draw = functools.partial(generate, self.network, *given, **how)
        with self.sampling():
            if self.mesh is None:
                return draw()
            own = self.root.whole(draw)
        # Without the cache: in it, each process has only its own rows.
        return Generated(*(self.mesh.gather_on_host(each, len(seeds)) for each in (own.tokens, own.mask, own.logprobs)))

    def stream(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> Iterator[np.ndarray]:
        if self.mesh is not None:
            how: dict[str, Any] = {"temperature": temperature, "stop_ids": stop_ids, "pad_id": pad_id}
            yield from super().stream(prompt_tokens, prompt_mask, seeds, **how)
            return
        put = self.backend.put
        with self.sampling():  # not held open while the caller handles the token
            decoding = Decoding(self.network, put(prompt_tokens), put(prompt_mask), put(seeds), temperature, stop_ids, pad_id)
        for t in range(seeds.shape[1]):
            yield decoding.tokens[:, t].cpu().numpy().astype(np.int32)
            if t + 1 == seeds.shape[1] or not decoding.alive.any():
                return
            with self.sampling():
                decoding.advance()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        # Inference mode is the fastest, but in it autocast does not cache cast weights and casts them again for each token, and
        # FSDP does not take tensors made in it. Autocast caches only weights that require gradients.
        exact = self.backend.config.precision == "float32"
        unrecorded = torch.inference_mode if exact and self.mesh is None else torch.no_grad
        frozen = [] if exact else [p for p in self.network.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with self.backend.autocast(), unrecorded():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def with_value_head(self) -> LanguageModel:
        return self.rebuilt(type(self), ScalarHead(np.zeros(self.hidden_size, np.float32)))

    def scalar_model(self, head: np.ndarray) -> Scalar:
        return self.rebuilt(Scalar, ScalarHead(head), lambda network: network.without_language_head())

    def save(self, folder: Path) -> None:
        """Save the language model alone: a value head belongs to training, not to the policy."""
        self.write(folder, causal_class(self.network.config))


class Scalar(TorchModel, ScalarModel):
    supplies = frozenset({"values", "scores"})

    def rescale(self, gain: float, bias: float) -> None:
        with torch.no_grad():
            self.head.weight.mul_(gain)
            self.head.bias.mul_(gain).add_(bias)

    def save(self, folder: Path) -> None:
        self.write(folder, classifier_class(self.network.config), num_labels=1)


def _creation_device(backend: TorchDevice) -> torch.device:
    """The device on which a network is created. With a mesh it is the CPU, from which FSDP moves it."""
    return backend.device if backend.mesh is None else torch.device("cpu")


def same_head(head: ScalarHead) -> ScalarHead:
    weight, bias = (on_host(tensor) for tensor in (head.weight, head.bias))
    return ScalarHead(weight, float(bias[0]))
