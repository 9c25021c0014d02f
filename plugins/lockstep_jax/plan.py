"""What the programs of a run need, as XLA reports it. They are compiled with shapes in place of arrays, for the devices here or
for a TPU that is not here.

XLA tells apart what goes into a program, what comes out, and the rest. So gradients are known where a program returns them, which
it does if an update has several terms; activations where a forward pass is kept; keys and values always.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lockstep.errors import ConfigError
from lockstep.models.blueprint import Blueprint
from lockstep.planning.calls import ACTIVATIONS, CACHE, GRADIENTS, Call, Need, Part, Shape
from lockstep_jax import generation, learner, mesh, model
from lockstep_jax.collectives import collectives, summed
from lockstep_jax.decoder import DecoderNetwork
from lockstep_jax.device import JaxDevice, devices_of, matmuls
from lockstep_jax.generation import Drawing
from lockstep_jax.learner import Rates, State
from lockstep_jax.model import Block, Static
from lockstep_jax.network import TEACHER, DropoutMask, NetworkSpec, Tree

TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip
"""Variables that libtpu asks for where there is no TPU."""


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, such as 'v5e:4x4'.

    Raises:
      ConfigError: libtpu is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    for name, value in TPU.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of many types
        raise ConfigError(
            f"There is no topology '{topology}' here: {str(error).splitlines()[0]:.200}. It needs `pip install libtpu`, in an "
            "environment of its own, and a name like v5e:4x4, v5p:2x2x1 or v6e:2x4."
        ) from error


class JaxPlanner:
    def __init__(self, config: JaxDevice.Config, topology: str | None):
        devices = topology_devices(topology) if topology else devices_of(config)
        self.config, self.device = config, devices[0]
        self.mesh = mesh.made(config.mesh, devices)
        self.devices = 1 if self.mesh is None else self.mesh.size
        self.kind = topology.partition(":")[0] if topology else self.device.device_kind
        self.rows = mesh.row_parts(self.mesh)
        self.shares_prompts = self.mesh is None
        self.memory = None if topology else (self.device.memory_stats() or {}).get("bytes_limit")
        self.process = PROCESS if self.device.platform == "cpu" else 0
        jax.config.update("jax_default_matmul_precision", matmuls(config.precision, self.device.platform))

    def held(self, blueprint: Blueprint) -> tuple[int, int]:
        trained, frozen = (
            sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
            for tree in self.placed(blueprint)
        )
        return trained, frozen

    def measure(self, call: Call) -> Need:
        kinds = {"generate": self._generate, "evaluate": self._evaluate, "forward": self._forward, "update": self._update}
        return kinds[call.kind](call)

    def _generate(self, call: Call) -> Need:
        (blueprint,) = call.models.values()
        shape, spec = call.shape, self.spec(blueprint)
        prompts = shape.prompts if self.shares_prompts else shape.rows
        prompt, response = (prompts, shape.prompt), (shape.rows, shape.response)
        drawing = Drawing(host(response, "uint32"), NUMBER, host((1,), "int32"), host((), "int32"))
        given = (*self.placed(blueprint), host(prompt, "int32"), host(prompt, "bool"), drawing)
        program = self.lowered(generation.generate, *given, None, spec=spec, greedy=False)
        compiled = program.compile()
        _, kept = jax.tree.map(placed_like, program.out_info, compiled.output_shardings)
        return need(compiled, loop=shape.response, parts={CACHE: local_bytes(kept)})

    def _evaluate(self, call: Call) -> Need:
        ((name, outputs),) = call.outputs.items()
        blueprint = call.models[name]
        given = (*self.placed(blueprint), block(call.shape, share=self.shares_prompts), NUMBER)
        return need(self.compiled(model._evaluate, *given, spec=self.spec(blueprint), outputs=outputs))

    def _forward(self, call: Call) -> Need:
        given = (*self.trees(call), block(call.shape, share=self.shares_prompts), NUMBER)
        compiled = self.compiled(learner._pass, *given, roles=self.roles(call, call.outputs))
        return need(compiled, parts={ACTIVATIONS: compiled.memory_analysis().output_size_in_bytes})

    def _update(self, call: Call) -> Need:
        assert call.optimizers is not None
        params, frozen = self.trees(call)
        averaged = {name: config.ema_decay is not None for name, config in call.optimizers.items()}
        states = {name: State(tree, tree, tree, tree if averaged[name] else None) for name, tree in params.items()}
        rates = {name: Rates(NUMBER, NUMBER, NUMBER, NUMBER) for name in params}
        how: dict[str, Any] = {"configs": tuple(call.optimizers.items())}
        if len(call.terms) == 1 and not call.terms[0].passed:
            (part,) = call.terms
            how |= {"roles": self.roles(call, part.outputs), "loss": part.loss}
            return need(self.compiled(learner._learn, states, frozen, *arguments(part, self.shares_prompts), rates, **how))
        gradients = sum(map(local_bytes, params.values()))
        distinct = [part for i, part in enumerate(call.terms) if part not in call.terms[:i]]
        needs = [self._gradients(call, part, params, frozen) for part in distinct]
        step = need(self.compiled(learner._step, states, params, rates, mesh=self.mesh, **how))
        sums = gradients * (len(call.terms) > 1)
        moments = [Need(gradients + step.temporary, parts={GRADIENTS: gradients})]
        moments += [Need(sums + each.temporary, parts={GRADIENTS: sums + gradients, **each.parts}) for each in needs]
        worst = max(moments, key=lambda moment: moment.temporary)
        every = [*(needs[distinct.index(part)].collectives for part in call.terms), step.collectives]
        return Need(worst.temporary, summed(itertools.chain(*every)), worst.parts)

    def _gradients(self, call: Call, part: Part, params: Mapping[str, Tree], frozen: Mapping[str, Tree]) -> Need:
        """The need of one term, including its gradients and, if its forward pass was kept, what the pass keeps."""
        roles = self.roles(call, part.outputs)
        if not part.passed:
            return need(
                self.compiled(
                    learner._gradients, params, frozen, *arguments(part, self.shares_prompts), roles=roles, loss=part.loss
                )
            )
        passed = self.lowered(learner._pass, params, frozen, block(part.shape, share=self.shares_prompts), NUMBER, roles=roles)
        outputs, pullback = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), passed.out_info)
        kept = passed.compile().memory_analysis().output_size_in_bytes
        back = need(self.compiled(learner._pulled_back, params, frozen, pullback, outputs, batch(part), loss=part.loss))
        return Need(kept + back.temporary, back.collectives, {ACTIVATIONS: kept})

    # ------------------------------------------------------------------------------------------------ shapes and places

    def spec(self, blueprint: Blueprint) -> NetworkSpec:
        b, c = blueprint, self.config
        return NetworkSpec(
            b.architecture, self.device.platform, c.precision, c.gradient_checkpointing, self.mesh, b.language_head,
            b.scalar_head, b.adapter, self.spec(b.teacher) if b.teacher else None, b.beta,
        )  # fmt: skip

    def placed(self, blueprint: Blueprint) -> tuple[Tree, Tree]:
        """Shapes of the trained and of the frozen parameters, placed on devices as in the run."""
        spec = self.spec(blueprint)
        tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: DecoderNetwork(spec, nnx.Rngs(0)))))
        layers = spec.architecture.layers
        tree["layers"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), tree["layers"])
        tree = self.where(tree)
        if blueprint.adapter is None:
            trained, frozen = tree, {}
        else:
            flat = nnx.traversals.flatten_mapping(tree)
            is_trained = {path: path[-1].startswith("lora") or path[0] == "score" for path in flat}
            trained, frozen = (
                nnx.traversals.unflatten_mapping({path: leaf for path, leaf in flat.items() if is_trained[path] == wanted})
                for wanted in (True, False)
            )
        return trained, frozen if blueprint.teacher is None else frozen | {TEACHER: self.placed(blueprint.teacher)}

    def where(self, tree: Tree) -> Tree:
        if self.mesh is None:
            there = SingleDeviceSharding(self.device)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)
        places = mesh.shardings(self.mesh, tree)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    def trees(self, call: Call) -> tuple[dict[str, Tree], dict[str, Tree]]:
        placed = {name: self.placed(blueprint) for name, blueprint in call.models.items()}
        return {name: params for name, (params, _) in placed.items()}, {name: frozen for name, (_, frozen) in placed.items()}

    def roles(self, call: Call, outputs: Mapping[str, tuple[str, ...]]) -> learner.Roles:
        return tuple((name, self.spec(call.models[name]), wanted) for name, wanted in outputs.items())

    def compiled(self, program: Any, *given: Any, **static: Any) -> Any:
        return self.lowered(program, *given, **static).compile()

    def lowered(self, program: Any, *given: Any, **static: Any) -> Any:
        """A program of the run, lowered. For a platform that is not here, the compiler options for this one are left out."""
        if self.device.platform != jax.default_backend():
            program = jax.jit(program.__wrapped__, static_argnames=tuple(static), donate_argnames=DONATED.get(program.__name__))
        return program.lower(*given, **static)


DONATED = {"_learn": "states", "_step": "states"}
PROCESS = 380_000_000
"""Measured for the miniature's stages: benchmarks/log.md."""
NUMBER = jax.ShapeDtypeStruct((), np.float32)


def host(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """The shape of an array that comes from the host and is whole on every device."""
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def block(shape: Shape, *, share: bool = True) -> Block:
    tokens, rows = host((shape.rows, shape.columns), "int32"), shape.rows
    masks = host((rows, shape.prompt), "bool"), host((rows, shape.response), "bool")
    return Block(tokens, *masks, tokens if shape.packed else None, Static(shape.rows_per_prompt if share else 1))


def batch(part: Part) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: host(shape, dtype) for name, (shape, dtype) in part.batch.items()}


def arguments(part: Part, share: bool) -> tuple[Any, ...]:
    """The arguments of a program with gradients, in the order of `lockstep_jax.learner`."""
    dropout = DropoutMask(NUMBER, host((part.shape.rows,), "uint32")) if part.dropout else None
    return block(part.shape, share=share and not part.dropout), batch(part), NUMBER, dropout


def local_bytes(tree: Tree) -> int:
    """Bytes of a tree on one device."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def placed_like(shape: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def need(compiled: Any, loop: int = 1, parts: Mapping[str, int] | None = None) -> Need:
    """What a compiled program needs. ``loop``: how often a loop runs if only its data decide when it ends."""
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Need(temporary, collectives(compiled.as_text(), loop), parts or {})
