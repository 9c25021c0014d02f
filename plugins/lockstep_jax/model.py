"""Models: a network with a language head, a scalar head or both, and the quantities they supply."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lockstep.errors import ConfigError
from lockstep.interfaces import Generated, Past, Policy, ScalarModel, check_vocabularies
from lockstep.learning import losses
from lockstep.models import adapters
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD, Architecture, family_of, to_hf
from lockstep.processes import call_text
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_weights
from lockstep.text.sequences import Sequences, rows_per_prompt
from lockstep_jax.decoder import DecoderNetwork, bind, recalled
from lockstep_jax.device import JaxDevice
from lockstep_jax.generation import Drawing, generate, proceed, start
from lockstep_jax.mesh import row_parts, rows, whole
from lockstep_jax.network import TEACHER, DropoutMask, NetworkSpec, Tree
from lockstep_jax.parameters import Gathered, from_arrays

LOGITS_AT_ONCE = 2**26
"""Elements of logits computed at once: a quarter of a gibibyte in float32, and several times that with gradients."""
HEAD = (SCALAR_HEAD, SCALAR_BIAS)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A number that is compiled into programs: each value has its own program."""

    value: int


class Block(NamedTuple):
    """`lockstep.text.sequences.Sequences` as input of a compiled program: tokens [B, P + T], masks [B, P] and [B, T], segments
    [B, P + T] or None. Each prompt has ``rows_per_prompt`` neighbouring rows."""

    tokens: Array
    prompt_mask: Array
    response_mask: Array
    segments: Array | None
    rows_per_prompt: Static

    @classmethod
    def put(cls, sequences: Sequences, *, share: bool) -> Block:
        """``share``: whether shared prompts may be computed once. With dropout or on a mesh they are not, so sharing would only
        compile another program."""
        s = sequences
        return cls(s.tokens, s.prompt_mask, s.response_mask, s.segments, Static(s.rows_per_prompt if share else 1))


def forward(
    spec: NetworkSpec,
    params: Tree,
    frozen: Tree,
    block: Block,
    outputs: Sequence[str],
    temperature: Any,
    dropout: DropoutMask | None = None,
) -> dict[str, Array]:
    """The named outputs, differentiable. Logits exist only at the T columns that predict a response token."""
    decoder = bind(spec, params, frozen)
    prompt_length = block.prompt_mask.shape[1]
    first = prompt_length - 1
    mask = jnp.concatenate([block.prompt_mask, block.response_mask], axis=1) if block.segments is None else block.segments
    shared = block.rows_per_prompt.value
    hidden = decoder.hidden(block.tokens, mask, dropout, first, shared)  # [B, T + 1, d]
    states = hidden[:, :-1]  # [B, T, d]: the state that predicts each response token
    out = {}
    if "logprobs" in outputs or "entropy" in outputs:
        # Padding ids may be outside the vocabulary, where JAX would read NaN.
        tokens = jnp.where(block.response_mask, block.tokens[:, prompt_length:], 0)
        out |= of_distribution(decoder, states, tokens, temperature, entropy="entropy" in outputs)
    if "divergence" in outputs and spec.teacher is not None:
        teacher = bind(spec.teacher, *jax.lax.stop_gradient(frozen[TEACHER]))
        theirs = teacher.hidden(block.tokens, mask, None, first, shared)[:, :-1]
        out["divergence"] = from_teacher(decoder, teacher, states, theirs, temperature, spec.beta)
    if "values" in outputs:
        out["values"] = decoder.score(states)
    if "scores" in outputs:
        last = block.response_mask.sum(axis=1)[:, None, None]
        out["scores"] = decoder.score(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return whole(spec.mesh, {name: out[name] for name in outputs})


def of_distribution(
    decoder: DecoderNetwork, states: Array, tokens: Array, temperature: Any, *, entropy: bool
) -> dict[str, Array]:
    """Log-probabilities and, if asked for, the entropy, each [B, T]."""
    head = decoder.head()

    def some(piece: tuple[Array, Array]) -> dict[str, Array]:
        states, tokens = piece
        logits = decoder.logits(states, head) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        out = {"logprobs": jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - normaliser}
        if entropy:
            out["entropy"] = normaliser - (jnp.exp(logits - normaliser[..., None]) * logits).sum(-1)
        return out

    return in_pieces(some, (states, tokens), decoder)


def from_teacher(
    decoder: DecoderNetwork, teacher: DecoderNetwork, states: Array, theirs: Array, temperature: Any, beta: float
) -> Array:
    """The divergence from the teacher [B, T], given both models' states [B, T, d] that predict each response token."""
    head, their_head = decoder.head(), teacher.head()

    def some(piece: tuple[Array, Array]) -> Array:
        own = jax.nn.log_softmax(decoder.logits(piece[0], head) / temperature)
        other = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.logits(piece[1], their_head) / temperature))
        return losses.divergence(jnp, own, other, beta)

    return in_pieces(some, (states, theirs), decoder)


def in_pieces(some: Callable[[Any], Any], inputs: tuple[Array, ...], decoder: DecoderNetwork) -> Any:
    """Apply ``some``, which computes logits and returns arrays [B, T], to inputs [B, T, ...]. If [B, T, V] is large, it never
    exists in full: a few columns at a time are computed, and recomputed for the gradient (Chen et al. 2016)."""
    count, length = inputs[0].shape[:2]
    own_rows = -(-count // row_parts(decoder.mesh))
    at_once = max(1, LOGITS_AT_ONCE // decoder.architecture.vocab_size // own_rows)
    if length <= at_once:
        return some(inputs)
    pieces = -(-length // at_once)
    at_once = -(-length // pieces)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, pieces * at_once - length), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(count, pieces, at_once, *x.shape[2:]).swapaxes(0, 1)

    again = jax.checkpoint(lambda piece: some(rows(decoder.mesh, piece)))
    found = jax.lax.map(again, tuple(map(cut, inputs)))
    return jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(count, -1)[:, :length], found)


@functools.partial(jax.jit, static_argnames=("spec", "outputs"))
def _evaluate(
    params: Tree, frozen: Tree, block: Block, temperature: Any, *, spec: NetworkSpec, outputs: tuple[str, ...]
) -> dict[str, Array]:
    return forward(spec, params, frozen, block, outputs, temperature)


class JaxModel:
    """The shared part of `LanguageModel` and `Scalar`. ``params`` are trained: they are replaced, never changed, because JAX
    arrays are immutable. ``frozen`` holds the rest: the trunk of an adapter, shared by every model on it, and a teacher under
    `TEACHER`. It is empty otherwise."""

    supplies: frozenset[str]

    def __init__(self, spec: NetworkSpec, params: Tree, backend: JaxDevice, frozen: Tree | None = None):
        self.spec = spec
        self.params = params
        self.frozen = frozen or {}
        self.backend = backend
        self.vocab_size, self.hidden_size = spec.architecture.vocab_size, spec.architecture.hidden_size
        self.context_length = spec.architecture.context_length

    @classmethod
    def from_arrays(
        cls, architecture: Architecture, arrays: Mapping[str, np.ndarray], backend: JaxDevice, *, language_head: bool
    ) -> Any:
        spec = NetworkSpec.on(backend, architecture, language_head=language_head, scalar_head=SCALAR_HEAD in arrays)
        return cls(spec, backend.put(from_arrays(architecture, arrays)), backend)

    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        self.check_length(sequences.longest)
        self.backend.processes.agree("batch", sequences.tokens, sequences.attention, call_text(outputs, temperature))
        block = Block.put(sequences, share=self.spec.mesh is None)
        out = _evaluate(self.params, self.frozen, block, temperature, spec=self.spec, outputs=tuple(outputs))
        return {name: np.asarray(value) for name, value in jax.device_get(out).items()}

    def check_length(self, longest: int) -> None:
        """Raise ConfigError if learned positions do not reach that far. JAX would silently read the last one again and again."""
        if self.spec.architecture.positions == "learned" and longest > self.context_length:
            raise ConfigError(
                f"{longest} tokens do not fit the model's context of {self.context_length}. Shorten the prompts or the responses."
            )

    def parameters(self) -> dict[str, np.ndarray]:
        return dict(self.arrays())

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from Gathered(self.spec.architecture, self.params).items()

    def copy(self) -> Any:
        return type(self)(self.spec, _copied(self.params), self.backend, self.frozen)

    def write(self, folder: Path, **config: Any) -> None:
        """Write a checkpoint of the family's causal language model, with the changes in ``config``; for an adapted network, only
        the adapter. Without ``num_labels``, the head is left out."""
        gathered, processes = Gathered(self.spec.architecture, self.params), self.backend.processes
        shapes = {name: shape for name, shape in gathered.shapes.items() if config or name not in HEAD}
        if self.spec.adapter is not None:
            adapters.write(folder, self.spec.adapter, shapes, gathered.__getitem__, processes, scalar=bool(config))
            return
        write_weights(folder, shapes, gathered.__getitem__, processes)
        if processes.leads:
            write_json(folder / "config.json", {**to_hf(self.spec.architecture), **config})


class LanguageModel(JaxModel, Policy):
    """A policy on JAX, created by `policies.py`."""

    @property
    def supplies(self) -> frozenset[str]:
        more = {"values": self.spec.scalar_head, "divergence": self.spec.teacher is not None}
        return frozenset({"logprobs", "entropy"} | {name for name, there in more.items() if there})

    def toward(self, teacher: Any, beta: float) -> LanguageModel:
        check_vocabularies(self, teacher)
        spec = dataclasses.replace(self.spec, teacher=teacher.spec, beta=beta)
        return type(self)(spec, _copied(self.params), self.backend, self.frozen | {TEACHER: (teacher.params, teacher.frozen)})

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
        self.check_length(int(prompt_mask.sum(axis=1).max()) + seeds.shape[1])
        self.backend.processes.agree("prompts", prompt_tokens, prompt_mask, seeds, call_text((), temperature))
        drawing = Drawing.of(seeds, temperature, stop_ids, pad_id)
        known = past and recalled(past.cache, past.rows, past.shift, known=past.known)
        how: dict[str, Any] = {"spec": self.spec, "greedy": temperature == 0}
        each = rows_per_prompt(prompt_tokens, prompt_mask) if past is None and self.spec.mesh is None else 1
        prompts = prompt_tokens[::each], prompt_mask[::each]
        drawn, cache = generate(self.params, self.frozen, *prompts, drawing, known, **how)
        tokens, mask, logprobs = map(np.asarray, jax.device_get(drawn))
        return Generated(tokens, mask, logprobs, cache)

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
        if self.backend.processes.count > 1:  # each process has its own rows
            settings: dict[str, Any] = {"temperature": temperature, "stop_ids": stop_ids, "pad_id": pad_id}
            yield from super().stream(prompt_tokens, prompt_mask, seeds, **settings)
            return
        self.check_length(int(prompt_mask.sum(axis=1).max()) + seeds.shape[1])
        drawing = Drawing.of(seeds, temperature, stop_ids, pad_id)
        how: dict[str, Any] = {"spec": self.spec, "greedy": temperature == 0}
        now, given = start(self.params, self.frozen, prompt_tokens, prompt_mask, drawing, **how), 0
        while True:
            step, alive, tokens = jax.device_get((now.step, now.alive.any(), now.tokens))
            tokens = tokens[:, given:step].copy()  # the next call donates the array
            yield from tokens.T
            if not alive or step == seeds.shape[1]:
                return
            now, given = proceed(self.params, self.frozen, now, drawing, **how), step

    def with_value_head(self) -> LanguageModel:
        head = {"weight": np.zeros((1, self.hidden_size), np.float32), "bias": np.zeros(1, np.float32)}
        spec = dataclasses.replace(self.spec, scalar_head=True)
        return type(self)(spec, _copied(self.params) | {"score": self.backend.put(head)}, self.backend, self.frozen)

    def scalar_model(self, head: np.ndarray) -> Scalar:
        score = {"weight": np.asarray(head, np.float32).reshape(1, -1), "bias": np.zeros(1, np.float32)}
        trunk, frozen = (
            {name: part for name, part in tree.items() if name not in ("lm_head", "score")} for tree in (self.params, self.frozen)
        )
        spec = dataclasses.replace(self.spec, language_head=False, scalar_head=True)
        return Scalar(spec, _copied(trunk) | {"score": self.backend.put(score)}, self.backend, frozen)

    def save(self, folder: Path) -> None:
        """Save the language model alone: a value head belongs to training, not to the policy."""
        self.write(folder)


class Scalar(JaxModel, ScalarModel):
    supplies = frozenset({"values", "scores"})

    def rescale(self, gain: float, bias: float) -> None:
        score = self.params["score"]
        self.params = self.params | {"score": {"weight": gain * score["weight"], "bias": gain * score["bias"] + bias}}

    def save(self, folder: Path) -> None:
        classifier = family_of(self.spec.architecture).classifier
        self.write(folder, architectures=[classifier], num_labels=1)


def _copied(params: Tree) -> Tree:
    """Copies of the arrays, because a learner donates those of the model that it trains."""
    return jax.tree.map(jnp.copy, params)
