"""Gradients of any loss over [batch, time], and Adam."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lockstep.interfaces import ForwardPass, Learner, Loss, Metrics, Term, suppliers, take_pass
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.processes import call_text
from lockstep.storage.weights import OnDisk, stored_learner, write_learner
from lockstep.text.sequences import Sequences
from lockstep_jax.device import JaxDevice, compiled, keep_freed_memory, scheduling
from lockstep_jax.mesh import divided, whole
from lockstep_jax.model import Block, JaxModel, forward
from lockstep_jax.network import DropoutMask, NetworkSpec, Tree
from lockstep_jax.parameters import Gathered, from_arrays

Roles = tuple[tuple[str, NetworkSpec, tuple[str, ...]], ...]
"""(model name, its network, the outputs that it gives to a loss). Hashable, because it is a static argument of compiled
programs."""

Configs = tuple[tuple[str, OptimizerConfig], ...]
"""(model name, its optimizer). Also hashable."""


SMALL = 2**25
"""Number of parameters. From here on, keeping freed memory costs gigabytes and saves little next to the arithmetic."""


class State(NamedTuple):
    """Everything of one model that training changes. ``average`` is None without ``ema_decay``; ``parameters`` is None while the
    model holds them."""

    parameters: Tree
    mean: Tree
    square: Tree
    average: Tree | None


class Rates(NamedTuple):
    """The numbers that change from step to step, computed on the host in double precision and passed to one program.

    ``mean`` and ``square`` are the bias corrections 1 - β^t. optax computes them in float32, where 1 - 0.999 is wrong by 1e-5:
    a difference from PyTorch that does not come from the networks.
    """

    learning_rate: float
    eps: float
    mean: float
    square: float

    @classmethod
    def at(cls, config: OptimizerConfig, step: int, lr_scale: float) -> Rates:
        """The rates of optimizer step ``step`` = 1, 2, ..."""
        first, second = config.betas
        return cls(config.learning_rate * lr_scale, config.eps_at(step), 1 - first**step, 1 - second**step)


class Graph(NamedTuple):
    """The outputs of a forward pass and their pullback to the parameters. It does not hold the parameters themselves."""

    outputs: dict[str, Array]
    pullback: Any


class JaxLearner(Learner):
    def __init__(self, backend: JaxDevice, models: Mapping[str, JaxModel], optimizers: Mapping[str, OptimizerConfig]):
        self.backend = backend
        self.models = dict(models)
        self.optimizers = {name: optimizers[name] for name in self.models}
        self.steps = 0
        self.kept: WeakKeyDictionary[ForwardPass, Graph] = WeakKeyDictionary()
        if sum(leaf.size for leaf in jax.tree.leaves((self._parameters(), self._frozen()))) < SMALL:
            keep_freed_memory()
        self.moments = {name: _initial(model.params, self.optimizers[name]) for name, model in self.models.items()}

    def forward(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> ForwardPass:
        self.backend.processes.agree("batch", sequences.tokens, sequences.attention, call_text(outputs, temperature))
        given = self._parameters(), self._frozen(), Block.put(sequences, share=self.backend.mesh is None), temperature
        graph = Graph(*_pass(*given, roles=self._roles(outputs)))
        host = {name: np.asarray(value) for name, value in jax.device_get(graph.outputs).items()}
        made = ForwardPass(sequences, temperature, host)
        self.kept[made] = graph
        return made

    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        self._agree(terms)
        rates = {name: Rates.at(config, self.steps + 1, lr_scale) for name, config in self.optimizers.items()}
        configs = tuple(self.optimizers.items())
        if len(terms) == 1 and terms[0].forward is None:
            given = (self._states(), self._frozen(), *self._arguments(terms[0]), rates)
            states, metrics = _learn(*given, configs=configs, **self._static(terms[0]))
        else:
            gradients, metrics = self._backward(terms)
            states, norms = _step(self._states(), gradients, rates, configs=configs, mesh=self.backend.mesh)
            metrics |= norms
        self._take(states)
        self.steps += 1
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def gradients(self, terms: Sequence[Term]) -> dict[str, np.ndarray]:
        self._agree(terms)
        gradients, _ = self._backward(terms)
        return {
            f"{name}.{key}": array
            for name, model in self.models.items()
            for key, array in Gathered(model.spec.architecture, gradients[name]).items()
        }

    def _agree(self, terms: Sequence[Term]) -> None:
        """Raise OutOfStep unless all processes pass the same terms."""
        self.backend.processes.agree("batch", *(each for term in terms for each in term.content))

    def _backward(self, terms: Sequence[Term]) -> tuple[dict[str, Tree], dict[str, Array]]:
        """The summed gradients and metrics of all terms, still on the device."""
        total, metrics = self._of_term(terms[0])
        for term in terms[1:]:
            gradients, more = self._of_term(term)
            total = _add(total, gradients)
            metrics |= {name: metrics.get(name, 0.0) + value for name, value in more.items()}
        return total, metrics

    def _of_term(self, term: Term) -> tuple[dict[str, Tree], dict[str, Array]]:
        """The term's gradients and metrics: from its forward pass if it has one."""
        params, frozen = self._parameters(), self._frozen()
        if term.forward is not None:
            graph = take_pass(self.kept, term.forward)
            return _pulled_back(params, frozen, graph.pullback, graph.outputs, dict(term.batch), loss=term.loss)
        return _gradients(params, frozen, *self._arguments(term), **self._static(term))

    def _arguments(self, term: Term) -> tuple[Block, dict[str, np.ndarray], float, DropoutMask | None]:
        dropout = term.dropout and DropoutMask(term.dropout.rate, term.dropout.seeds)
        block = Block.put(term.sequences, share=dropout is None and self.backend.mesh is None)
        return block, dict(term.batch), term.temperature, dropout

    def _static(self, term: Term) -> dict[str, Any]:
        return {"roles": self._roles(term.loss.outputs), "loss": term.loss}

    def _roles(self, outputs: Sequence[str]) -> Roles:
        return tuple((name, self.models[name].spec, wanted) for name, wanted in suppliers(self.models, outputs).items())

    def averaged(self, model: str) -> JaxModel:
        averaged = self.models[model].copy()
        if self.moments[model].average is not None:
            averaged.params = jax.tree.map(jnp.copy, self.moments[model].average)
        return averaged

    def save(self, folder: Path) -> None:
        trees = self._gathered()
        places = {f"{prefix}{name}": (tree, name) for prefix, tree in trees.items() for name in tree}
        shapes = {full: tree.shapes[name] for full, (tree, name) in places.items()}

        def gather(full: str) -> np.ndarray:
            tree, name = places[full]
            return tree[name]

        write_learner(folder, shapes, gather, self.steps, self.backend.processes)

    def restore(self, folder: Path) -> None:
        trees = self._gathered()
        shapes = {f"{prefix}{name}": shape for prefix, tree in trees.items() for name, shape in tree.shapes.items()}
        stored, steps = stored_learner(folder, shapes)
        while trees:  # one tree at a time, so that the one it replaces is freed
            prefix, tree = trees.popitem()
            name, part = prefix[:-1].rsplit(".", 1)
            arrays = OnDisk({key: stored[f"{prefix}{key}"] for key in tree})
            del tree
            restored = self.backend.put(from_arrays(self.models[name].spec.architecture, arrays))
            self._take({name: self._states()[name]._replace(**{part: restored})})
        self.steps = steps

    def _gathered(self) -> dict[str, Gathered]:
        """Every tree that training changes, by the prefix of its names in files."""
        return {
            f"{name}.{part}.": Gathered(self.models[name].spec.architecture, tree)
            for name, state in self._states().items()
            for part, tree in state._asdict().items()
            if tree is not None
        }

    def _parameters(self) -> dict[str, Tree]:
        return {name: model.params for name, model in self.models.items()}

    def _frozen(self) -> dict[str, Tree]:
        return {name: model.frozen for name, model in self.models.items()}

    def _states(self) -> dict[str, State]:
        return {name: state._replace(parameters=self.models[name].params) for name, state in self.moments.items()}

    def _take(self, states: Mapping[str, State]) -> None:
        """Store the new states. The models hold the parameters, so that they are trained in place; the learner holds the rest.
        Forward passes over the previous parameters are dropped."""
        self.kept.clear()
        for name, state in states.items():
            self.models[name].params = state.parameters
            self.moments[name] = state._replace(parameters=None)


def _initial(params: Tree, config: OptimizerConfig) -> State:
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    average = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return State(parameters=None, mean=zeros(params), square=zeros(params), average=average)


# ------------------------------------------------------------------- programs: compiled once per loss, roles and shapes


@compiled(scheduling, static_argnames=("roles", "loss"))
def _gradients(
    params: dict[str, Tree], frozen: dict[str, Tree], block: Block, batch: dict[str, Array], temperature: Any,
    dropout: DropoutMask | None, *, roles: Roles, loss: Loss,
) -> tuple[dict[str, Tree], dict[str, Array]]:  # fmt: skip
    """The gradients and metrics of one term."""

    def objective(params: dict[str, Tree]) -> tuple[Array, dict[str, Array]]:
        value, metrics = loss(jnp, _outputs(params, frozen, block, temperature, dropout, roles), batch)
        return value, {"loss": value, **metrics}

    gradients, metrics = jax.grad(objective, has_aux=True)(params)
    return divided(_mesh(roles), gradients), whole(_mesh(roles), metrics)


def _mesh(roles: Roles) -> Mesh | None:
    return roles[0][1].mesh


def _outputs(
    params: dict[str, Tree], frozen: dict[str, Tree], block: Block, temperature: Any, dropout: DropoutMask | None, roles: Roles
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, spec, wanted in roles:
        found |= forward(spec, params[name], frozen[name], block, wanted, temperature, dropout)
    return found


@compiled(scheduling, static_argnames="roles")
def _pass(
    params: dict[str, Tree], frozen: dict[str, Tree], block: Block, temperature: Any, *, roles: Roles
) -> tuple[dict[str, Array], Any]:
    """The outputs and their pullback. The pullback is a pytree without the parameters, which `_pulled_back` is given anyway."""
    run = lambda params, frozen: _outputs(params, frozen, block, temperature, None, roles)  # noqa: E731
    outputs, pullback = jax.vjp(run, params, frozen)
    pullback.args_res = []
    return outputs, pullback


@compiled(scheduling, static_argnames="loss")
def _pulled_back(
    params: dict[str, Tree], frozen: dict[str, Tree], pullback: Any, outputs: dict[str, Array], batch: dict[str, Array], *,
    loss: Loss,
) -> tuple[dict[str, Tree], dict[str, Array]]:  # fmt: skip
    """`_gradients` of one term, from its forward pass."""

    def objective(outputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        value, metrics = loss(jnp, outputs, batch)
        return value, {"loss": value, **metrics}

    slopes, metrics = jax.grad(objective, has_aux=True)(outputs)
    pullback.args_res = jax.tree.leaves((params, frozen))
    return pullback(slopes)[0], metrics


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, more)


@functools.partial(jax.jit, static_argnames=("configs", "mesh"), donate_argnames="states")
def _step(
    states: dict[str, State], gradients: dict[str, Tree], rates: dict[str, Rates], *, configs: Configs, mesh: Mesh | None
) -> tuple[dict[str, State], dict[str, Array]]:
    """Take one optimizer step of every model. Also returns the gradient norms."""
    norms = {name: optax.tree.norm(gradients[name]) for name, _ in configs}
    stepped = {name: _adam(config, states[name], gradients[name], norms[name], rates[name]) for name, config in configs}
    stepped = {name: State(*(divided(mesh, tree) for tree in state)) for name, state in stepped.items()}
    return stepped, whole(mesh, {f"grad_norm/{name}": norm for name, norm in norms.items()})


@compiled(scheduling, static_argnames=("roles", "loss", "configs"), donate_argnames="states")
def _learn(
    states: dict[str, State], frozen: dict[str, Tree], block: Block, batch: dict[str, Array], temperature: Any,
    dropout: DropoutMask | None, rates: dict[str, Rates], *, roles: Roles, loss: Loss, configs: Configs,
) -> tuple[dict[str, State], dict[str, Array]]:  # fmt: skip
    """Gradients and step in one program, for an update of one term: no gradient outlives its use."""
    params = {name: state.parameters for name, state in states.items()}
    # Call the function, not the program: a program inside another takes no compiler options.
    gradients, metrics = _gradients.function(params, frozen, block, batch, temperature, dropout, roles=roles, loss=loss)
    states, norms = _step(states, gradients, rates, configs=configs, mesh=_mesh(roles))
    return states, metrics | norms


def _adam(config: OptimizerConfig, state: State, gradient: Tree, norm: Array, rates: Rates) -> State:
    """Clip, take an Adam step with decoupled weight decay, update the moving average:
    `lockstep.learning.optimisation.OptimizerConfig`."""
    first, second = config.betas
    if config.max_grad_norm is not None:
        clip = jnp.minimum(config.max_grad_norm / (norm + 1e-6), 1.0)  # as PyTorch clips
        gradient = jax.tree.map(lambda g: clip * g, gradient)
    mean = optax.tree.update_moment(gradient, state.mean, first, 1)
    square = optax.tree.update_moment_per_elem_norm(gradient, state.square, second, 2)

    def stepped(path: Any, p: Array, m: Array, v: Array) -> Array:
        direction = (m / rates.mean) / (jnp.sqrt(v / rates.square) + rates.eps)
        if _is_matrix(path, p):
            direction = direction + config.weight_decay * p
        return p - rates.learning_rate * direction

    parameters = jax.tree_util.tree_map_with_path(stepped, state.parameters, mean, square)
    average = None
    if config.ema_decay is not None:
        average = optax.incremental_update(parameters, state.average, 1 - config.ema_decay)
    return State(parameters, mean, square, average)


def _is_matrix(path: Any, array: Array) -> bool:
    """True for matrices: weight decay leaves gains and biases alone. In the stack of layers, arrays have one more axis."""
    return array.ndim - (path[0].key == "layers") >= 2
