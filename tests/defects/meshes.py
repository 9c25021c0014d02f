"""Backends whose meshes are wrong on purpose. Those of torch run as two processes (`defects.several`), those of JAX on four
devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import torch
import torch.distributed as dist

from defects import defect
from lockstep_jax.backend import JaxBackend
from lockstep_torch.backend import TorchBackend
from lockstep_torch.mesh import Group, Mesh, TensorAxis, _Gather


class Divided(TorchBackend):
    """The torch backend with a mesh of another class, or with processes of another."""

    count = 2
    overrides = ("backend.mesh.fsdp=2",)
    Mesh, Group = Mesh, Group

    def __init__(self, config):
        super().__init__(config)
        if self.mesh is not None:
            self.mesh.__class__, self.processes.__class__ = self.Mesh, self.Group


@defect("backend", caught_by="a_mesh_draws_the_tokens_of_one_device")
class OtherRows(Divided):
    """A slice that is wrong by one process: each has the rows of the next."""

    class Mesh(Mesh):
        def own(self, rows):
            each = -(-rows // self.group.count)
            index = (self.group.rank + 1) % self.group.count * each + np.arange(each)
            return np.where(index < rows, index, 0)


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class Averages(Divided):
    """Gradients of processes are averaged, as data parallelism does, though the loss has divided by what it counts."""

    class Mesh(Mesh):
        def divide(self, network, head):
            root = super().divide(network, head)
            for module in root.modules():
                if hasattr(module, "set_gradient_divide_factor"):
                    module.set_gradient_divide_factor(float(self.group.count))
            return root


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class SlopesOfTheFirst(Divided):
    """Every process takes the first one's rows of the gradient with respect to what was gathered."""

    class Mesh(Mesh):
        def gather(self, own, rows):
            return _First.apply(own, self)[:rows]


class _First(_Gather):
    @staticmethod
    def backward(ctx, *slopes):
        return slopes[0][: ctx.rows].contiguous(), None


@defect("backend", caught_by="all_processes_have_the_same_bits")
class MissingAllReduce(Divided):
    """Replicas do not add up their gradients: each has that of its own rows."""

    overrides = ("backend.mesh.data=2",)

    class Mesh(Mesh):
        def divide(self, network, head):
            whole, self.devices = self.devices, self.devices["fsdp"]
            root = super().divide(network, head)
            self.devices = whole
            return root


@defect("backend", caught_by="all_processes_have_the_same_bits")
class OwnNoise(Divided):
    """A process adds what it draws itself."""

    class Mesh(Mesh):
        def gather(self, own, rows):
            return super().gather(own, rows) * (1 + 1e-6 * self.group.rank)


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class OtherShape(Divided):
    """A process gathers a row more than the others. It has to be an error that names it, and nobody waits."""

    class Mesh(Mesh):
        def gather(self, own, rows):
            return super().gather(torch.cat([own, own[:1]]) if self.group.rank else own, rows)


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class OtherOrder(Divided):
    """A process has its collectives in another order. It has to be an error that names it, and nobody waits."""

    class Mesh(Mesh):
        def gather(self, own, rows):
            if self.group.rank:
                dist.all_reduce(torch.ones(1))
            found = super().gather(own, rows)
            if not self.group.rank:
                dist.all_reduce(torch.ones(1))
            return found


class OtherAxis(Divided):
    """With matmuls that are divided in another way."""

    overrides = ("backend.mesh.tensor=2",)
    Axis = TensorAxis

    def __init__(self, config):
        super().__init__(config)
        if self.mesh is not None:
            self.mesh.tensor.__class__ = self.Axis


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class SlopesOfOnePart(OtherAxis):
    """What goes into matmuls that are divided gets the gradient of this process's part alone."""

    class Axis(TensorAxis):
        def copied(self, x):
            return x


@defect("backend", caught_by="a_mesh_draws_the_tokens_of_one_device")
class PartOfASum(OtherAxis):
    """What comes out of them is this process's part of the sum."""

    class Axis(TensorAxis):
        def summed(self, part):
            return part


@defect("backend", caught_by="a_process_out_of_step_is_named")
class NeverCompares(Divided):
    """Processes go on with whatever each was given."""

    class Group(Group):
        def agree(self, what, *content):
            pass


# ---------------------------------------------------------------------------------------------------------------- JAX


class Meshed(JaxBackend):
    """The JAX backend on four devices, with a learner that goes wrong on a mesh only."""

    like, policy = "jax", "lockstep_jax.policies:Decoder"
    overrides = ("backend.device=cpu", "backend.mesh.fsdp=4")

    def learner(self, models, optimizers):
        from lockstep_jax.learner import JaxLearner

        if self.mesh is None:
            return JaxLearner(self, models, optimizers)
        return type("Learner", (self.Wrong, JaxLearner), {})(self, models, optimizers)


def of_another(tree):
    """Each device's part of a large array where the next one's should be."""
    return jax.tree.map(lambda x: jax.device_put(np.roll(x, x.shape[-1] // 4, axis=-1), x.sharding) if x.ndim > 1 else x, tree)


@defect("backend", caught_by="a_mesh_computes_what_one_device_computes")
class DropsUnevenRows(Meshed):
    """Rows that the devices do not divide are left out."""

    class Wrong:
        def _of_term(self, term):
            rows = slice(0, max(1, term.sequences.rows // 4 * 4))
            batch = {name: array[rows] for name, array in term.batch.items()}
            return super()._of_term(dataclasses.replace(term, sequences=term.sequences.take(rows), batch=batch))


@defect("backend", caught_by="a_mesh_learns_what_one_device_learns")
class UpdatesOfAnotherPart(Meshed):
    """A part of the parameters is updated with the moments of another."""

    class Wrong:
        def update(self, terms, lr_scale=1.0):
            self.moments = {name: state._replace(mean=of_another(state.mean)) for name, state in self.moments.items()}
            return super().update(terms, lr_scale)


@defect("backend", caught_by="state_passes_between_a_mesh_and_one_device")
class RestoresAnotherPart(Meshed):
    """A part of the moving average is read at the place of another."""

    class Wrong:
        def restore(self, folder):
            super().restore(folder)
            state = self.moments["policy"]
            self.moments["policy"] = state._replace(average=of_another(state.average))
