"""Backends that are wrong on purpose: most have a wrong learner."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from defects import defect
from lockstep.interfaces import Dropout
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import read_tensors, write_tensors
from lockstep_torch.backend import TorchBackend
from lockstep_torch.learner import TorchLearner, _trained
from lockstep_torch.policies import Decoder


class Relearned(TorchBackend):
    """The torch backend with a learner of another class."""

    Learner = TorchLearner

    def learner(self, models, optimizers):
        return self.Learner(self, models, optimizers)


class Changed(TorchLearner):
    """A learner that changes terms before they are run, or gradients after."""

    def term(self, term):
        return term

    def gradient(self, parameter):
        return parameter.grad

    def _backward(self, terms):
        metrics = super()._backward([self.term(term) for term in terms])
        for parameter in (p for adam in self.adams.values() for p in _trained(adam)):
            parameter.grad = self.gradient(parameter)
        return metrics


# ---------------------------------------------------------------------------------------------------------- gradients


@defect("backend", caught_by="gradients_are_derivatives")
class HalvesGradients(Relearned):
    """Gradients are divided by a number of devices that was already divided by."""

    class Learner(Changed):
        def gradient(self, parameter):
            return parameter.grad / 2


@defect("backend", caught_by="gradients_are_derivatives")
class FreezesEmbeddings(Relearned):
    """One tensor takes no part."""

    class Learner(Changed):
        def gradient(self, parameter):
            return parameter.grad * (parameter.shape != (37, 32))


@defect("backend", caught_by="gradients_are_derivatives")
class LosesSmallGradients(Relearned):
    """Small gradients are lost, as in half precision without loss scaling."""

    class Learner(Changed):
        def gradient(self, parameter):
            return torch.where(parameter.grad.abs() < 0.5 * parameter.grad.abs().max(), 0.0, parameter.grad)


@defect("backend", caught_by="ties_have_half_the_slope")
class MaximumOfOne(Relearned):
    """max(a, b) is written as a choice: at a tie all of the gradient goes to a."""

    class Learner(Changed):
        def term(self, term):
            return dataclasses.replace(term, loss=Choosing(term.loss))


@dataclasses.dataclass(frozen=True)
class Choosing:
    loss: object

    @property
    def outputs(self):
        return self.loss.outputs

    def __call__(self, xp, outputs, batch):
        return self.loss(Chooses(xp), outputs, batch)


class Chooses:
    def __init__(self, xp):
        self.xp = xp

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def maximum(self, a, b):
        return torch.where(a >= b, a, b)


@defect("backend", caught_by="gradients_take_no_step")
class LeavesGradientsBehind(Relearned):
    """Gradients of the last update are still there when the next are added."""

    class Learner(TorchLearner):
        def _backward(self, terms):
            old = {p: p.grad for adam in self.adams.values() for p in _trained(adam) if p.grad is not None}
            metrics = super()._backward(terms)
            for parameter, gradient in old.items():
                parameter.grad = parameter.grad + gradient
            return metrics


@defect("backend", caught_by="gradients_take_no_step")
class CountsGradientsAsSteps(Relearned):
    """Asking for gradients counts as an optimizer step in the bias correction."""

    class Learner(TorchLearner):
        def gradients(self, terms):
            found = super().gradients(terms)
            for adam in self.adams.values():
                for state in adam.state.values():
                    state["step"] += 1
            self.steps += 1
            return found


@defect("backend", caught_by="micro_batches_add_up")
class MicroBatchMeans(Relearned):
    """Each micro-batch is normalised by its own token count."""

    class Learner(Changed):
        def term(self, term):
            weights = term.batch.get("weights")
            return term if weights is None else dataclasses.replace(term, batch=term.batch | {"weights": weights / weights.sum()})


@defect("backend", caught_by="gradients_of_rows_with_the_same_prompt")
class FirstTokensOnce(Relearned):
    """Of the rows with the same prompt, the first token of one row alone is learned from."""

    class Learner(Changed):
        def term(self, term):
            weights, each = term.batch.get("weights"), term.sequences.rows_per_prompt
            if weights is None or each == 1:
                return term
            weights = weights.copy()
            weights[np.arange(len(weights)) % each > 0, 0] = 0
            return dataclasses.replace(term, batch=term.batch | {"weights": weights})


@defect("backend", caught_by="terms_add_up")
class MeanOfTerms(Relearned):
    """Terms are averaged."""

    class Learner(TorchLearner):
        def _backward(self, terms):
            metrics = super()._backward(terms)
            for parameter in (p for adam in self.adams.values() for p in _trained(adam)):
                parameter.grad /= len(terms)
            return metrics


@defect("backend", caught_by="terms_add_up")
class OneTemperature(Relearned):
    """All terms are run at the temperature of the first."""

    class Learner(TorchLearner):
        def _backward(self, terms):
            return super()._backward([dataclasses.replace(term, temperature=terms[0].temperature) for term in terms])


@defect("backend", caught_by="losses_with_other_settings_are_other_losses")
class LossesByClass(Relearned):
    """Compiled losses are looked up by class."""

    class Learner(Changed):
        def term(self, term):
            self.losses = getattr(self, "losses", {})
            return dataclasses.replace(term, loss=self.losses.setdefault(type(term.loss), term.loss))


@defect("backend", caught_by="masked_columns_are_inert")
class PaddingTakesPart(TorchBackend):
    """The policy attends to padding."""

    policy = "defects.policies:AttendsToPadding"


@defect("backend", caught_by="masked_columns_are_inert")
class MultipliesByTheMask(Relearned):
    """The loss is kept in the graph by adding 0 times everything: 0 · NaN is NaN."""

    class Learner(Changed):
        def term(self, term):
            nothing = sum(0.0 * array.sum() for array in term.batch.values() if array.dtype == np.float32)
            return dataclasses.replace(term, batch=term.batch | {"row_weights": term.batch["row_weights"] + np.float32(nothing)})


@defect("backend", caught_by="clipped_ratios_get_no_gradient")
class AddsPenalty(Relearned):
    """Weight decay as an L2 penalty in the gradient."""

    class Learner(Changed):
        def gradient(self, parameter):
            return parameter.grad + 1e-4 * parameter.detach()


@defect("backend", caught_by="each_output_comes_from_the_first_that_supplies_it")
class LastSupplierWins(Relearned):
    """Every model gives all it has; the last one overwrites the others."""

    class Learner(TorchLearner):
        def _forward(self, *how):
            models = self.models
            self.models = dict(reversed(models.items()))
            try:
                return super()._forward(*how)
            finally:
                self.models = models


@defect("backend", caught_by="each_output_comes_from_the_first_that_supplies_it")
class MissingIsZero(Relearned):
    """An output that no model supplies counts as 0."""

    class Learner(TorchLearner):
        def _forward(self, sequences, outputs, *how):
            zeros = torch.zeros(sequences.mask.shape, requires_grad=True)
            supplied = [name for name in outputs if any(name in model.supplies for model in self.models.values())]
            return dict.fromkeys(outputs, zeros) | super()._forward(sequences, supplied, *how)


@defect("backend", caught_by="a_forward_pass_serves_its_own_term")
class KeepsForTooLong(Relearned):
    """A pass serves after a step, too."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            kept = dict(self.kept)
            metrics = super().update(terms, lr_scale)
            self.kept.update(kept)
            return metrics


@defect("backend", caught_by="a_forward_pass_serves_its_own_term")
class ServesAnyTerm(Relearned):
    """The pass that was made last is taken for the next term, whatever that is."""

    class Learner(TorchLearner):
        def _outputs(self, term):
            return self.kept.pop(next(iter(self.kept))) if self.kept else super()._outputs(term)


@defect("backend", caught_by="a_forward_pass_serves_its_own_term")
class KeepsWithoutTemperature(Relearned):
    """A pass is made at temperature 1."""

    class Learner(TorchLearner):
        def forward(self, sequences, outputs, *, temperature=1.0):
            made = super().forward(sequences, outputs, temperature=1.0)
            renamed = dataclasses.replace(made, temperature=temperature)
            self.kept[renamed] = self.kept.pop(made)
            return renamed


# --------------------------------------------------------------------------------------------------------- one update


@defect("backend", caught_by="updates_are_adam")
class ExtraStep(Relearned):
    """One more optimizer step for every update of several terms."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            metrics = super().update(terms, lr_scale)
            if len(terms) > 1:
                self._backward(terms)
                for adam in self.adams.values():
                    adam.step()
            return metrics


@defect("backend", caught_by="updates_are_adam")
class EpsilonInsideTheRoot(Relearned):
    """m / sqrt(v + eps)."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            before = {name: {k: t.detach().clone() for k, t in model.tensors().items()} for name, model in self.models.items()}
            metrics = super().update(terms, lr_scale)
            for name, model in self.models.items():
                config = self.optimizers[name]
                first, second = (1 - beta**self.steps for beta in config.betas)
                for key, tensor in model.tensors().items():
                    state, old = self.adams[name].state[tensor], before[name][key]
                    step = state["exp_avg"] / first / (state["exp_avg_sq"] / second + config.eps_at(self.steps)).sqrt()
                    decay = config.weight_decay * old * (old.ndim > 1)
                    tensor.data.copy_(old - config.learning_rate * lr_scale * (step + decay))
            return metrics


class Reconfigured(TorchLearner):
    """A learner that reads another configuration."""

    change: dict = {}

    def __init__(self, backend, models, optimizers):
        super().__init__(backend, models, {name: dataclasses.replace(o, **self.change) for name, o in optimizers.items()})


@defect("backend", caught_by="updates_are_adam")
class OneEpsilon(Relearned):
    """tf_style is not heeded."""

    class Learner(Reconfigured):
        change = {"tf_style": False}


@defect("backend", caught_by="updates_are_adam")
class NeverClips(Relearned):
    """max_grad_norm is not heeded."""

    class Learner(Reconfigured):
        change = {"max_grad_norm": None}


@defect("backend", caught_by="updates_are_adam")
class IgnoresSchedule(Relearned):
    """lr_scale is not heeded."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            return super().update(terms, 1.0)


@defect("backend", caught_by="updates_are_adam")
class DecaysGains(Relearned):
    """Weight decay on norms' gains and on biases."""

    class Learner(TorchLearner):
        def __init__(self, backend, models, optimizers):
            super().__init__(backend, models, optimizers)
            for adam in self.adams.values():
                adam.param_groups[1]["weight_decay"] = adam.param_groups[0]["weight_decay"]


@defect("backend", caught_by="updates_are_adam")
class SkipsWithoutGradient(Relearned):
    """A model that no loss reaches takes no step: its moments stand still."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            for adam in self.adams.values():
                adam.step = lambda adam=adam: _reached(adam) and type(adam).step(adam)
            return super().update(terms, lr_scale)


def _reached(adam):
    return any(parameter.grad.any() for parameter in _trained(adam))


@defect("backend", caught_by="updates_are_adam")
class OptimizersInOrder(Relearned):
    """Optimizers are given out in the order they come in, not by name."""

    class Learner(TorchLearner):
        def __init__(self, backend, models, optimizers):
            super().__init__(backend, models, dict(zip(models, optimizers.values(), strict=False)))


@defect("backend", caught_by="metrics_are_sums")
class NormAfterClipping(Relearned):
    """The gradient's norm is taken after clipping."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            metrics = super().update(terms, lr_scale)
            limits = {name: config.max_grad_norm or np.inf for name, config in self.optimizers.items()}
            return metrics | {f"grad_norm/{name}": min(metrics[f"grad_norm/{name}"], limit) for name, limit in limits.items()}


@defect("backend", caught_by="metrics_are_sums")
class MetricsOfTheLastTerm(Relearned):
    """Only the last term's metrics are returned."""

    class Learner(TorchLearner):
        def _backward(self, terms):
            last = super()._backward(terms[-1:])
            super()._backward(terms)
            return last


@defect("backend", caught_by="batches_arrive_as_they_are")
class IntegerRows(Relearned):
    """Numbers per row take the dtype of token ids: 0.73 becomes 0."""

    class Learner(Changed):
        def term(self, term):
            batch = {name: array.astype(np.int64) if array.ndim == 1 else array for name, array in term.batch.items()}
            return dataclasses.replace(term, batch=batch)


@defect("backend", caught_by="batches_arrive_as_they_are")
class HalfBatches(Relearned):
    """Batches travel in half precision."""

    class Learner(Changed):
        def term(self, term):
            half = {name: array.astype(np.float16) for name, array in term.batch.items() if array.dtype == np.float32}
            return dataclasses.replace(term, batch={**term.batch, **{n: a.astype(np.float32) for n, a in half.items()}})


@defect("backend", caught_by="models_are_trained_in_place")
class TrainsCopies(Relearned):
    """The learner trains copies of the models it was given."""

    def learner(self, models, optimizers):
        return super().learner({name: model.copy() for name, model in models.items()}, optimizers)


class SharesItsReference(Decoder):
    """A policy whose copy is itself."""

    def copy(self):
        return self


@defect("backend", caught_by="models_are_trained_in_place")
class TrainsTheReference(TorchBackend):
    """The reference moves along with the policy."""

    policy = "defects.backends:SharesItsReference"


@defect("backend", caught_by="averages_follow_the_weights")
class AverageFromZero(Relearned):
    """The average starts at 0 and is not corrected for it."""

    class Learner(TorchLearner):
        def __init__(self, backend, models, optimizers):
            super().__init__(backend, models, optimizers)
            for average in (tensor for tensors in self.averages.values() for tensor in tensors.values()):
                average.zero_()


@defect("backend", caught_by="averages_follow_the_weights")
class AverageOfTheModelItself(Relearned):
    """Without ema_decay the trained model is handed out, and goes on changing."""

    class Learner(TorchLearner):
        def averaged(self, model):
            return super().averaged(model) if model in self.averages else self.models[model]


@defect("backend", caught_by="averages_follow_the_weights")
class AverageBeforeTheStep(Relearned):
    """The average lags one step behind."""

    class Learner(TorchLearner):
        def update(self, terms, lr_scale=1.0):
            TorchLearner._average(self)
            return super().update(terms, lr_scale)

        def _average(self):
            pass


@defect("backend", caught_by="restoring_goes_on_bit_for_bit")
class LosesTheAverage(Relearned):
    """The moving average is not in the files: it starts again from the restored weights."""

    class Learner(TorchLearner):
        def _state(self):
            return {name: tensor for name, tensor in super()._state().items() if ".average." not in name}


@defect("backend", caught_by="restoring_refuses_another_state")
class TakesTheStepsOfAnotherState(Relearned):
    """A state that does not fit is refused, but its step count is kept."""

    class Learner(TorchLearner):
        def restore(self, folder):
            self.steps = read_json(folder / "learner.json")["steps"]
            super().restore(folder)


@defect("backend", caught_by="restoring_refuses_another_state")
class PassesOverWhatItLacks(Relearned):
    """Averages that the files have, and the learner does not, are passed over."""

    class Learner(TorchLearner):
        def restore(self, folder):
            stored = read_tensors(folder / "learner.safetensors")
            own = self._state()
            write_tensors(folder / "learner.safetensors", {name: array for name, array in stored.items() if name in own})
            super().restore(folder)


@defect("backend", caught_by="restoring_goes_on_bit_for_bit")
class LosesTheStepCount(Relearned):
    """The step count starts again: bias correction is that of the first step."""

    class Learner(TorchLearner):
        def save(self, folder):
            super().save(folder)
            write_json(folder / "learner.json", {"steps": 0})


@defect("backend", caught_by="restoring_goes_on_bit_for_bit")
class LosesTheMoments(Relearned):
    """Parameters are restored, Adam's moments are not."""

    class Learner(TorchLearner):
        def restore(self, folder):
            super().restore(folder)
            for adam in self.adams.values():
                for state in adam.state.values():
                    state["exp_avg"].zero_()
                    state["exp_avg_sq"].zero_()


@defect("backend", caught_by="restoring_goes_on_bit_for_bit")
class Pickles(Relearned):
    """The optimizer is pickled beside the weights."""

    class Learner(TorchLearner):
        def save(self, folder):
            super().save(folder)
            torch.save({"steps": self.steps}, folder / "optimizer.pt")


# ----------------------------------------------------------------------------------------------------------- packing


@defect("backend", caught_by="examples_that_share_a_row_are_apart")
class AttendsAcrossExamples(Relearned):
    """Training takes a row for one long example."""

    class Learner(Changed):
        def term(self, term):
            return dataclasses.replace(term, sequences=dataclasses.replace(term.sequences, segments=None))


class Leaky(Decoder):
    """A policy that takes a row for one long example, but only where it evaluates."""

    def evaluate(self, sequences, outputs, *, temperature=1.0):
        return super().evaluate(dataclasses.replace(sequences, segments=None), outputs, temperature=temperature)


@defect("backend", caught_by="examples_that_share_a_row_are_apart")
class EvaluatesAcrossExamples(TorchBackend):
    """Segments are forgotten outside of training."""

    policy = f"{__name__}:Leaky"


# ----------------------------------------------------------------------------------------------------------- dropout


class Redropped(Changed):
    """A learner with another dropout."""

    def dropout(self, dropout):
        return dropout

    def term(self, term):
        return term if term.dropout is None else dataclasses.replace(term, dropout=self.dropout(term.dropout))


@defect("backend", caught_by="dropout_depends_on_seeds_alone")
class DropoutByRow(Relearned):
    """Bits come from the row's place in the micro-batch."""

    class Learner(Redropped):
        def dropout(self, dropout):
            return Dropout(dropout.rate, dropout.seeds + np.arange(len(dropout.seeds), dtype=np.uint32))


@defect("backend", caught_by="dropout_depends_on_seeds_alone")
class NoDropout(Relearned):
    """Dropout is configured and never applied."""

    class Learner(Redropped):
        def dropout(self, dropout):
            return None


@defect("backend", caught_by="dropout_is_the_documented_bits")
class KeepsInsteadOfDrops(Relearned):
    """The rate is taken for the probability to keep."""

    class Learner(Redropped):
        def dropout(self, dropout):
            return Dropout(1 - dropout.rate, dropout.seeds)


@defect("backend", caught_by="dropout_is_the_documented_bits")
class OtherBits(Relearned):
    """The seeds go through another generator first."""

    class Learner(Redropped):
        def dropout(self, dropout):
            return Dropout(dropout.rate, dropout.seeds * np.uint32(2654435761))


# ---------------------------------------------------------------------------------------------------------- the rest


@defect("backend", caught_by="describes_itself")
class DescribesWithObjects(TorchBackend):
    """The device is an object of the library, which no JSON file takes."""

    def describe(self):
        return {**super().describe(), "device": self.device}


@defect("backend", caught_by="describes_itself")
class MemoryInMegabytes(TorchBackend):
    """A float in megabytes where a count of bytes belongs."""

    def peak_memory_bytes(self):
        return 12.5
