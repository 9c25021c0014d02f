"""Gradients of any loss over [batch, time], and Adam."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from lockstep.interfaces import ForwardPass, Learner, Metrics, Term, suppliers, take_pass
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.processes import call_text
from lockstep.storage.weights import OnDisk, stored_learner, write_learner
from lockstep.text.sequences import Sequences
from lockstep_torch.device import TorchDevice
from lockstep_torch.mesh import divided_alike, fill, full, on_host
from lockstep_torch.model import Block, TorchModel
from lockstep_torch.network import DropoutMask


class TorchLearner(Learner):
    def __init__(self, backend: TorchDevice, models: Mapping[str, TorchModel], optimizers: Mapping[str, OptimizerConfig]):
        self.backend = backend
        self.models = dict(models)
        self.optimizers = dict(optimizers)
        self.adams = {name: _adam(model, optimizers[name]) for name, model in self.models.items()}
        self.steps = 0
        self.kept: WeakKeyDictionary[ForwardPass, dict[str, Tensor]] = WeakKeyDictionary()  # outputs with their graph
        self.averages = {
            name: {key: tensor.detach().clone() for key, tensor in model.tensors().items()}
            for name, model in self.models.items()
            if optimizers[name].ema_decay is not None
        }

    def forward(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> ForwardPass:
        self.backend.processes.agree("batch", sequences.tokens, sequences.attention, call_text(outputs, temperature))
        found = self._forward(sequences, outputs, temperature)
        host = {name: value.detach().float().cpu().numpy() for name, value in found.items()}
        made = ForwardPass(sequences, temperature, host)
        self.kept[made] = found
        return made

    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        metrics = self._backward(terms)
        self.steps += 1
        for name, adam in self.adams.items():
            config = self.optimizers[name]
            metrics[f"grad_norm/{name}"] = _clip(_trained(adam), config.max_grad_norm)
            for group in adam.param_groups:
                group["lr"], group["eps"] = config.learning_rate * lr_scale, config.eps_at(self.steps)
            adam.step()
            adam.zero_grad(set_to_none=True)  # else gradients would take memory until the next update
        self.kept.clear()
        self._average()
        return {name: float(value) for name, value in metrics.items()}

    def gradients(self, terms: Sequence[Term]) -> dict[str, np.ndarray]:
        self._backward(terms)
        return {
            f"{name}.{key}": on_host(tensor.grad)
            for name, model in self.models.items()
            for key, tensor in model.tensors().items()
        }

    def _backward(self, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Sum the gradients of all terms into the parameters. Return the summed metrics, still on the device."""
        self.backend.processes.agree("batch", *(each for term in terms for each in term.content))
        for adam in self.adams.values():
            adam.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for term in terms:
            outputs = self._outputs(term)
            batch = {name: self.backend.put(array) for name, array in term.batch.items()}
            loss, metrics = term.loss(xp, outputs, batch)
            loss.backward()
            for name, value in {"loss": loss, **metrics}.items():
                total[name] = total.get(name, 0.0) + value.detach()
        for parameter in (p for adam in self.adams.values() for p in _trained(adam) if p.grad is None):
            parameter.grad = torch.zeros_like(parameter)  # so that Adam's moments decay here too, as in every backend
        return total

    def _outputs(self, term: Term) -> dict[str, Tensor]:
        """The outputs that the term's loss reads, with their graph: from the term's forward pass if it has one."""
        if term.forward is not None:
            return take_pass(self.kept, term.forward)
        dropout = term.dropout and DropoutMask(term.dropout.rate, self.backend.put(term.dropout.seeds))
        return self._forward(term.sequences, term.loss.outputs, term.temperature, dropout)

    def _forward(
        self, sequences: Sequences, outputs: Iterable[str], temperature: float, dropout: DropoutMask | None = None
    ) -> dict[str, Tensor]:
        block = Block.put(sequences, self.backend)
        found: dict[str, Tensor] = {}
        for name, wanted in suppliers(self.models, outputs).items():
            found |= self.models[name].forward(block, wanted, temperature, dropout)
        return found

    @torch.no_grad()
    def _average(self) -> None:
        for name, average in self.averages.items():
            decay = self.optimizers[name].ema_decay
            for key, tensor in self.models[name].tensors().items():
                average[key].lerp_(tensor, 1 - decay)

    def averaged(self, model: str) -> TorchModel:
        averaged = self.models[model].copy()
        if model in self.averages:
            with torch.no_grad():
                for key, tensor in averaged.tensors().items():
                    tensor.copy_(self.averages[model][key])
        return averaged

    def save(self, folder: Path) -> None:
        state = self._state()
        write_learner(folder, _shapes(state), lambda name: on_host(state[name]), self.steps, self.backend.processes)

    def restore(self, folder: Path) -> None:
        own = self._state()
        stored, self.steps = stored_learner(folder, _shapes(own))
        self.kept.clear()
        fill(own, OnDisk(stored))
        for adam in self.adams.values():
            for parameter in _trained(adam):
                adam.state[parameter]["step"] = torch.tensor(float(self.steps), device=parameter.device)

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name. Before the first step, Adam's moments are created here as zeros."""
        state: dict[str, Tensor] = {}
        for name, model in self.models.items():
            for key, tensor in model.tensors().items():
                moments = self.adams[name].state[tensor]
                if "exp_avg" not in moments:
                    moments |= {
                        "step": torch.tensor(0.0, device=tensor.device),
                        "exp_avg": torch.zeros_like(tensor),
                        "exp_avg_sq": torch.zeros_like(tensor),
                    }
                state[f"{name}.parameters.{key}"] = tensor
                state[f"{name}.mean.{key}"] = moments["exp_avg"]
                state[f"{name}.square.{key}"] = moments["exp_avg_sq"]
            for key, tensor in self.averages.get(name, {}).items():
                state[f"{name}.average.{key}"] = tensor
        return state


def _adam(model: TorchModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on gains and biases. It is fused, because every pass over memory counts: on
    two cores a step of 135 million parameters took a seventh of the time of ``foreach``."""
    groups = [
        {"params": some, "weight_decay": decay}
        for alike in divided_alike(model.tensors().values())
        for some, decay in (([t for t in alike if t.ndim >= 2], config.weight_decay), ([t for t in alike if t.ndim < 2], 0.0))
        if some
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _clip(parameters: list[torch.nn.Parameter], limit: float | None) -> Tensor:
    """The norm of the parameters' gradients. If the norm is above ``limit``, the gradients are scaled down to it."""
    most, groups = float("inf") if limit is None else limit, divided_alike(parameters)
    if len(groups) == 1:
        return full(torch.nn.utils.clip_grad_norm_(parameters, most))
    norms = [full(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups]
    norm = torch.stack(norms).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, most, norm)
    return norm


def _trained(adam: torch.optim.AdamW) -> list[torch.nn.Parameter]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
