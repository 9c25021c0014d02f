"""Estimate what the calls of a run need, by running its code on fake tensors, which have shapes and storages but no memory.

Each tensor is followed from the operation that makes it until it is freed, so that it is known what is there at the worst moment:
gradients, what a forward pass left for them, keys and values. Not measured: memory that kernels take internally,
except for one kernel that takes as much as its input; freed memory that an allocator keeps, on a CPU up to a fifth of a process;
the optimizer's step, which takes less than the end of the gradients. FSDP's weights and gradients are added by arithmetic.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.config.mesh import MeshConfig
from lockstep.interfaces import Dropout, ForwardPass, Loss, Term
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import is_small_decoder, linear_layers, to_hf
from lockstep.models.blueprint import Blueprint
from lockstep.planning.calls import ACTIVATIONS, CACHE, GATHERED, GRADIENTS, Call, Need, Part, Shape, Traffic, traffic
from lockstep.planning.parts import FLOAT32
from lockstep.text.sequences import Sequences
from lockstep_torch import device, generation
from lockstep_torch.decoder import Cache, DecoderNetwork
from lockstep_torch.device import TorchDevice
from lockstep_torch.generation import Decoding
from lockstep_torch.layers import MLP, Attention
from lockstep_torch.learner import TorchLearner
from lockstep_torch.lora import adapted
from lockstep_torch.mesh import Mesh, Root, TensorAxis, keep_own
from lockstep_torch.model import Block, Scalar, TorchModel
from lockstep_torch.network import Network, ScalarHead
from lockstep_torch.policies import Decoder
from lockstep_torch.transformers_network import TransformersNetwork

PROCESS = 365_000_000
"""Measured: a process that trains the miniature with two layers of 16 takes 363 to 369 MB, whatever the stage."""


class TorchPlanner:
    def __init__(self, backend: TorchDevice, mesh: MeshConfig):
        """``backend``: of a single process, without a mesh."""
        self.backend, here = backend, backend.device
        on_cuda = here.type == "cuda"
        self.data, self.fsdp, self.tensor = device.axes(mesh, torch.cuda.device_count() if on_cuda else None)
        self.rows = self.data * self.fsdp
        self.devices = self.rows * self.tensor
        self.shares_prompts = True
        self.kind = torch.cuda.get_device_name(here) if on_cuda else here.type
        self.memory = torch.cuda.get_device_properties(here).total_memory if on_cuda else None
        self.process = 0 if on_cuda else PROCESS
        if self.devices > 1:
            self.backend.mesh = FirstProcess(self.rows, self.tensor)

    def held(self, blueprint: Blueprint) -> tuple[int, int]:
        trained, frozen, adapter = blueprint.trained, blueprint.frozen, blueprint.adapter
        others = blueprint.multiplied - blueprint.multiplied // self.tensor  # of the matmuls, the other processes' shards
        if adapter is None:
            return (trained - others) // self.fsdp, frozen
        low = adapter.shapes(linear_layers(blueprint.architecture))
        sharded = sum(math.prod(shape) for name, shape in low.items() if not _is_summed(name))
        return (trained - sharded + sharded // self.tensor) // self.fsdp, frozen - others

    def measure(self, call: Call) -> Need:
        kinds = {"generate": self._generate, "evaluate": self._evaluate, "forward": self._forward, "update": self._update}
        for blueprint in call.models.values():
            generation.word_hashes(blueprint.architecture.vocab_size, self.backend.device)  # it is cached, so it must not be fake
        with FakeTensorMode(allow_non_fake_inputs=True):
            models = {name: self.model(blueprint) for name, blueprint in call.models.items()}
            found = kinds[call.kind](call, models)
            gathered = self.gathered(call.kind, models.values())
            parts = found.parts() | ({GATHERED: gathered} if gathered else {})
            return Need(found.most + gathered, tuple(self.collectives(call, models)), parts)

    def _generate(self, call: Call, models: Mapping[str, Any]) -> Following:
        (model,) = models.values()
        rows = -(-call.shape.rows // self.rows)
        columns, length = call.shape.prompt, call.shape.response
        prompts = rows // math.gcd(rows, call.shape.rows_per_prompt)
        with model.sampling(), Following() as found:
            put = self.backend.put
            tokens, mask = put(np.zeros((prompts, columns), np.int32)), put(np.ones((prompts, columns), bool))
            seeds = put(np.zeros((rows, length), np.uint32))
            decoding = Decoding(model.network, tokens, mask, seeds, temperature=1.0, stop_ids=(0,), pad_id=0)
            found.mark(CACHE, keys_and_values(decoding.cache))
            if length > 1:
                fill(decoding.cache, columns + length - 1)
                found.mark(CACHE, keys_and_values(decoding.cache))
                decoding.advance()
                found.mark(CACHE, keys_and_values(decoding.cache))
        return found

    def _evaluate(self, call: Call, models: Mapping[str, TorchModel]) -> Following:
        (model,) = models.values()
        with torch.no_grad(), Following() as found:
            model.forward(Block.put(sequences(call.shape), self.backend), everything(call.outputs), 1.0)
        return found

    def _forward(self, call: Call, models: Mapping[str, TorchModel]) -> Following:
        learner = self.learner(call, models)
        with Following() as found:
            kept = learner._forward(sequences(call.shape), everything(call.outputs), 1.0)
            found.turn()
            del kept
        return found

    def _update(self, call: Call, models: Mapping[str, TorchModel]) -> Following:
        learner = self.learner(call, models)
        enough = [part for i, part in enumerate(call.terms) if part.passed or call.terms[:i].count(part) < 2]
        trained = [tensor for model in models.values() for tensor in model.tensors().values()]
        with Following() as found, self.scattered(models.values(), found):
            terms = [self.term(learner, part) for part in enough]  # a third equal part adds nothing
            learner._backward([replace(term, loss=Turning(term.loss, found, trained)) for term in terms])
            found.mark(GRADIENTS, gradients(trained))
        return found

    def term(self, learner: TorchLearner, part: Part) -> Term:
        """A term with batches of zeros. If its forward pass is made before the update, it is made now."""
        block, outputs = sequences(part.shape), everything(part.outputs)
        batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in part.batch.items()}
        dropout = Dropout(0.1, np.zeros(part.shape.rows, np.uint32)) if part.dropout else None
        if not part.passed:
            return Term(part.loss, block, batch, dropout=dropout)
        made = ForwardPass(block, 1.0, dict.fromkeys(outputs, np.zeros(())))
        learner.kept[made] = learner._forward(block, outputs, 1.0)
        return Term(part.loss, block, batch, forward=made)

    # ------------------------------------------------------------------------------------------------------------ models

    def learner(self, call: Call, models: Mapping[str, TorchModel]) -> TorchLearner:
        return TorchLearner(self.backend, models, call.optimizers or dict.fromkeys(models, OptimizerConfig()))

    def model(self, blueprint: Blueprint) -> TorchModel:
        with self.backend.device, unmoved():
            network = network_of(blueprint, self.backend.mesh)
            head = ScalarHead(np.zeros(network.hidden_size, np.float32)) if blueprint.scalar_head else None
            if not blueprint.language_head:
                return Scalar(network.without_language_head(), head, self.backend)
            model = Decoder(network, head, self.backend)
        if blueprint.teacher is not None:
            model.teacher, model.beta = self.model(blueprint.teacher), blueprint.beta
        return model

    # -------------------------------------------------------------------------------------------------------------- FSDP

    def gathered(self, kind: str, models: Iterable[TorchModel]) -> int:
        """Bytes of gathered weights. While tokens are drawn: all of them. Otherwise: the weights outside of layers, one layer and
        the next. An update also needs the copy of a layer's gradients that is sent."""
        if self.fsdp == 1:
            return 0
        inside, outside = [0], 0
        for model in models:
            layers = [sum(FLOAT32 * p.numel() for p in layer.parameters()) for layer in divided(model)]
            inside += layers
            outside += sum(FLOAT32 * tensor.numel() for tensor in model.tensors().values()) - sum(layers)
        return outside + (sum(inside) if kind == "generate" else (3 if kind == "update" else 2) * max(inside))

    def collectives(self, call: Call, models: Mapping[str, TorchModel]) -> Iterator[Traffic]:
        """Weights are gathered for a pass and again for its gradients, which are then summed. Outputs are gathered for the
        loss."""
        if self.devices == 1:
            return
        if call.kind == "generate":
            yield from self.all_gathered(models.values())
            fed = replace(call.shape, response=call.shape.response - 1)  # the last token is not fed
            yield from self.summed(fed, models.values())
        elif call.kind != "update":
            yield from self.of_pass(call.outputs, call.shape, models)
        for part in call.terms:
            learning = [models[name] for name in part.outputs]
            if not part.passed:
                yield from self.of_pass(part.outputs, part.shape, models)
            yield from self.all_gathered(learning)
            yield from self.summed(part.shape, learning, again=True)
            for groups, size in map(self.groups, learning):
                if self.fsdp > 1:
                    yield traffic("reduce-scatter", groups, size / groups, self.fsdp, self.tensor)
                if self.data > 1:
                    yield traffic("all-reduce", groups, size / groups / self.fsdp, self.data, self.fsdp * self.tensor)

    def of_pass(
        self, outputs: Mapping[str, tuple[str, ...]], shape: Shape, models: Mapping[str, TorchModel]
    ) -> Iterator[Traffic]:
        reading = [models[name] for name in outputs]
        yield from self.all_gathered(reading)
        yield from self.summed(shape, reading)
        for name in everything(outputs):
            numbers = shape.rows if name == "scores" else shape.rows * shape.response
            yield traffic("all-gather", 1, FLOAT32 * numbers * self.tensor, self.devices)  # every process sends its outputs

    def all_gathered(self, models: Iterable[TorchModel]) -> Iterator[Traffic]:
        if self.fsdp > 1:
            for groups, size in map(self.groups, models):
                yield traffic("all-gather", groups, size / groups, self.fsdp, self.tensor)

    def summed(self, shape: Shape, models: Iterable[TorchModel], again: bool = False) -> Iterator[Traffic]:
        """Sums along ``tensor``, in float32: after each pair of matmuls of a pass or, with ``again``, before each pair for its
        gradient, of the adapters' whole matrices, and of the recomputation, which ends before a layer's second sum."""
        if self.tensor == 1:
            return
        tokens, needed = -(-shape.tokens // self.rows), -(-shape.needed // self.rows)
        for model in models:
            layers, width = model.network.layers(), model.network.hidden_size
            computed = [tokens] * (len(layers) - 1) + [needed]  # in the last layer, prompts give only keys and values
            if not again:
                sums = [width * columns for columns in computed for _ in range(2)]
            else:
                below = model.network.adapter is None  # whether anything trained is below
                sums = [math.prod(tensor.shape) for name, tensor in model.tensors().items() if _is_summed(name)]
                for layer, columns in zip(layers, computed, strict=True):
                    for pair, read in ((layer.self_attn, tokens), (layer.mlp, columns)):
                        sums += [width * read] * below
                        below = below or any(p.requires_grad for p in pair.parameters())
                    sums += [width * columns] * (below and self.backend.config.gradient_checkpointing)
            yield traffic("all-reduce", len(sums), FLOAT32 * sum(sums) / len(sums), self.tensor)

    def groups(self, model: TorchModel) -> tuple[int, int]:
        """How many groups of weights FSDP gathers, one after the other, and the bytes of all groups."""
        return 1 + len(divided(model)), sum(FLOAT32 * tensor.numel() for tensor in model.tensors().values())

    @contextlib.contextmanager
    def scattered(self, models: Iterable[TorchModel], found: Following) -> Iterator[None]:
        """Shard the gradients of layers as soon as they are made. Those outside of layers wait for the end."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: found.divide(p.grad, self.fsdp))
            for model in models
            for layer in divided(model)
            for parameter in layer.parameters()
        ]
        yield
        for hook in hooks:
            hook.remove()


class FirstProcess(Mesh):
    """The first process of a mesh, without the others: it has its part of the rows, and of the matmuls that the axis ``tensor``
    divides. All other weights are whole."""

    def __init__(self, row_parts: int, tensor: int):
        self.row_parts, self.tensor = row_parts, OnePart(tensor) if tensor > 1 else None
        self.sizes = {"rows": row_parts, "tensor": tensor}

    def own(self, rows: int) -> np.ndarray:
        return np.arange(-(-rows // self.row_parts))

    def gather(self, own: Tensor, rows: int) -> Tensor:
        return torch.cat([own] * self.row_parts)[:rows]

    def divide(self, network: nn.Module, head: nn.Module | None) -> Root:
        self.divide_matmuls(network)
        return Root(network, head)


class OnePart(TensorAxis):
    """A tensor axis without the other processes."""

    def __init__(self, size: int):
        self.size = size

    def add(self, x: Tensor) -> None: ...

    def placed(self, part: Tensor, axis: int) -> Tensor:
        return part


def divided(model: TorchModel) -> list[nn.Module]:
    """The layers that `lockstep_torch.mesh.Mesh.divide` shards one by one."""
    return [] if model.network.adapter is not None else model.network.layers()


# ---------------------------------------------------------------------------------------------------------------- fakes


@dataclass(eq=False)
class Life:
    """Of a storage of ``size`` bytes, from one event until another."""

    size: int
    begun: int
    ended: float = math.inf
    part: str | None = None

    def spans(self, event: int) -> bool:
        return self.begun <= event < self.ended


class Following(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside: ``alive`` now, and the ``most`` so far. Events are numbered: a
    storage's beginning or end, and each `turn` from a forward pass to its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = self.events = self.worst = 0
        self.turns: list[int] = []
        self.lives: list[Life] = []
        self.present: dict[int, Life] = {}
        self.ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages((args, kwargs)):  # an operation's inputs were there before
            self.follow(storage, 0)
        made = func(*args, **kwargs or {})
        if func in INSIDE:
            self.reach(self.alive + args[0].nbytes)
        for storage in storages(made):
            self.follow(storage, storage.nbytes())
        return made

    def follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key not in self.present:
            self.ends[key] = weakref.ref(storage, lambda _: self.end(key))
            self.begin(key, size)

    def begin(self, key: int, size: int) -> None:
        self.events += 1
        self.present[key] = Life(size, self.events)
        self.lives.append(self.present[key])
        self.alive += size
        self.reach(self.alive)

    def end(self, key: int) -> None:
        self.events += 1
        life = self.present.pop(key)
        life.ended = self.events
        self.alive -= life.size
        self.ends.pop(key)

    def reach(self, total: int) -> None:
        if total > self.most:
            self.most, self.worst = total, self.events

    def divide(self, tensor: Tensor, parts: int) -> None:
        """From now on, count one part of the tensor; the others are elsewhere."""
        key = id(tensor.untyped_storage())
        end = self.ends[key]
        self.end(key)
        self.ends[key] = end
        self.begin(key, -(-tensor.nbytes // parts))

    def turn(self) -> None:
        """What is there now was kept by a forward pass for its gradient."""
        self.turns.append(self.events)

    def mark(self, part: str, tensors: Iterable[Tensor]) -> None:
        for storage in storages(list(tensors)):
            self.present[id(storage)].part = part

    def parts(self) -> dict[str, int]:
        """{part: its bytes at the worst moment}. The rest is temporary."""
        found: Counter[str] = Counter()
        for life in self.lives:
            kept = ACTIVATIONS if any(map(life.spans, self.turns)) else None
            if life.spans(self.worst) and (part := life.part or kept):
                found[part] += life.size
        return {part: size for part, size in found.items() if size}


class Turning:
    """A loss, after which a pass turns to its gradient. The gradients until then are those of earlier terms: fakes are not added
    in place."""

    def __init__(self, loss: Loss, found: Following, trained: list[Tensor]):
        self.loss, self.found, self.trained, self.outputs = loss, found, trained, loss.outputs

    def __call__(self, xp: Any, outputs: Any, batch: Any) -> Any:
        made = self.loss(xp, outputs, batch)
        self.found.mark(GRADIENTS, gradients(self.trained))
        self.found.turn()
        return made


def gradients(trained: list[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in trained if tensor.grad is not None]


INSIDE = {torch.ops.aten.logsumexp.default}
"""Kernels that take as much as their input."""


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_summed(name: str) -> bool:
    """True for the matrix of an adapter that the axis ``tensor`` leaves whole, so that its gradient has to be summed."""
    layer, _, matrix = name.rpartition(".lora_")
    return matrix.startswith("B" if layer.endswith((*Attention.ends, *MLP.ends)) else "A")


def network_of(blueprint: Blueprint, mesh: Mesh | None) -> Network:
    """The network that `lockstep_torch.policies` would open, without its weights."""
    a = blueprint.architecture
    network: Network
    if is_small_decoder(a):
        network = DecoderNetwork(a)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        network = TransformersNetwork(AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf(a))).eval())
        network.__dict__["can_pack"] = True  # finding out takes real numbers
    if blueprint.adapter is None:
        return network
    if mesh is not None:
        mesh.divide_matmuls(network)
    keep_own(network)
    return adapted(network, blueprint.adapter)


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Leave modules where they are made: fakes cannot be moved, not even to their own device."""
    move = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign,assignment,misc]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def fill(cache: Any, columns: int) -> None:
    """Make a decoding's cache what it is at the last token, with ``columns`` filled."""
    if isinstance(cache, Cache):
        cache.read = columns
        return
    cache["mask"] = cache["mask"].new_ones(len(cache["mask"]), columns)
    for layer in cache["past"].layers:
        window = getattr(layer, "sliding_window", None)
        layer.cumulative_length = columns  # read only in layers with a window
        for name in ("keys", "values"):
            rows, heads, _, width = getattr(layer, name).shape
            kept = columns if window is None else min(columns, window - 1)
            setattr(layer, name, getattr(layer, name).new_zeros(rows, heads, kept, width))


def keys_and_values(cache: Any) -> list[Tensor]:
    if isinstance(cache, Cache):
        return [*cache.keys, *cache.values]
    return [tensor for layer in cache["past"].layers for tensor in (layer.keys, layer.values)]


def sequences(shape: Shape) -> Sequences:
    prompts = np.arange(shape.rows)[:, None] // shape.rows_per_prompt % 2  # neighbouring prompts differ
    tokens, counts = np.repeat(prompts.astype(np.int32), shape.columns, axis=1), np.ones((shape.rows, shape.response), bool)
    segments = np.ones_like(tokens) if shape.packed else None
    return Sequences(tokens, np.ones((shape.rows, shape.prompt), bool), counts, counts, segments)


def everything(outputs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for names in outputs.values() for name in names)
