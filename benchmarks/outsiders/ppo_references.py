"""The arithmetic of PPO as its reference code does it, as numbers for tests/test_outsiders.py.

It runs functions out of three public repositories, in checkouts of them; none of their code is here. What is run is
found by name in their files; the last one is a script, of which it runs the statements between two of its lines.

    openai/lm-human-preferences                 train_policy.py: PPOTrainer.loss, compute_rewards, AdaptiveKLController;
                                                utils/core.py: whiten
    vwxyzjn/lm-human-preference-details         tests/test_gae.py: compute_gae_for_loop;
                                                train_policy_accelerate.py: _single_tensor_adam (TensorFlow's Adam)
    vwxyzjn/summarize_from_feedback_details     ppo_left_padding_new.py ("The N+ Implementation Details"): rewards,
                                                whitening, GAE and both losses with padding masks

lm-human-preferences is TensorFlow 1: here its ops are a dozen PyTorch functions under TensorFlow's names (class TF below),
which also gives gradients. In the environment that trl_losses.py describes:

    PYTHONPATH=framework /tmp/trl_env/bin/python benchmarks/outsiders/ppo_references.py \
      LM_HUMAN_PREFERENCES LM_HUMAN_PREFERENCE_DETAILS SUMMARIZE_FROM_FEEDBACK_DETAILS tests/fixtures/outsiders

It writes lhp.json, n_plus.json and tf_adam.json.
"""

import ast
import collections.abc
import contextlib
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
import trl_losses

B, T = 8, 6
CLIP = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "gamma": 1.0, "lam": 0.95}
TF_ADAM = {"betas": [0.9, 0.999], "eps": 1e-5, "weight_decay": 0.0, "max_grad_norm": 1.0}


class TF:
    """The part of tensorflow that is needed, on torch tensors. ``reduce_mean`` and ``moments`` are over all entries."""

    float32 = torch.float32
    name_scope = staticmethod(contextlib.nullcontext)
    stack = staticmethod(lambda values, axis: torch.stack(values, dim=axis))
    stop_gradient = staticmethod(torch.detach)
    clip_by_value = staticmethod(lambda x, low, high: torch.minimum(torch.maximum(x, _tensor(low)), _tensor(high)))
    square, exp, rsqrt = torch.square, torch.exp, torch.rsqrt
    reduce_mean, maximum, greater = torch.mean, torch.maximum, torch.gt
    cast = staticmethod(lambda x, kind: x.to(kind))
    nn = SimpleNamespace(moments=lambda x, axes: (x.mean(), x.var(unbiased=False)))


def _tensor(x):
    return x if torch.is_tensor(x) else torch.tensor(x)


class WithShape(torch.Tensor):
    """``x.shape.ndims`` and ``x.shape.rank``, as TensorFlow has them."""

    @property
    def shape(self):
        shape = tuple(torch.Tensor.size(self))
        found = type("Shape", (tuple,), {"ndims": len(shape), "rank": len(shape)})
        return found(shape)


def main(lhp: Path, lhpd: Path, n_plus: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    trl_losses.write(folder / "lhp.json", lm_human_preferences(lhp, lhpd))
    trl_losses.write(folder / "n_plus.json", n_plus_details(n_plus))
    trl_losses.write(folder / "tf_adam.json", tf_adam(lhpd))


# -------------------------------------------------------------------------------------------------- finding their code


def named(path: Path, names: list[str], namespace: dict) -> dict:
    """Functions and classes of a file, by name and wherever they are nested, run in ``namespace``."""
    wanted = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            wanted.setdefault(node.name, node)
    assert wanted.keys() == set(names), set(names) - wanted.keys()
    for name in names:
        exec(compile(ast.Module([wanted[name]], []), str(path), "exec"), namespace)
    return namespace


def statements(path: Path, first: str, last: str, namespace: dict) -> dict:
    """The lines from the one that starts with ``first`` up to, and without, the next that starts with ``last``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(last))
    exec(compile(textwrap.dedent("\n".join(lines[start:stop])), str(path), "exec"), namespace)
    return namespace


# --------------------------------------------------------------------------------------------------- fixed random inputs


def rollout(seed: int) -> dict:
    """Numbers of the size that PPO meets, with six decimals, so that JSON holds them exactly."""
    rng = np.random.default_rng(seed)
    old = -rng.gamma(2.0, 0.8, (B, T))
    values = rng.normal(0.3, 0.6, (B, T))
    found = {
        "scores": rng.normal(0.4, 1.1, B),
        "old_logprobs": old,
        "ref_logprobs": old + rng.normal(0, 0.3, (B, T)),
        "old_values": values,
        "new_logprobs": old + rng.normal(0, 0.25, (B, T)),  # about a third beyond the clip range
        "new_values": values + rng.normal(0, 0.3, (B, T)),
    }
    return {name: np.round(array, 6) for name, array in found.items()}


def tensors(arrays: dict) -> dict:
    return {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}


def numbers(x) -> object:
    """As JSON, nine digits: enough for float32."""
    if torch.is_tensor(x):
        x = x.detach().as_subclass(torch.Tensor).numpy()
    array = np.asarray(x, np.float64)
    return [numbers(row) for row in array] if array.ndim else trl_losses.rounded(float(array))


# ------------------------------------------------------------------------------------------------- lm-human-preferences


def lm_human_preferences(lhp: Path, lhpd: Path) -> dict:
    folder = lhp / "lm_human_preferences"
    core = named(folder / "utils" / "core.py", ["flatten_dict", "whiten"], {"tf": TF, "collections": collections.abc})
    utils = SimpleNamespace(whiten=core["whiten"], flatten_dict=core["flatten_dict"])
    wanted = ["AdaptiveKLController", "compute_rewards", "loss"]
    theirs = {"self": None, "tf": TF, "np": np, "utils": utils}
    named(folder / "train_policy.py", wanted, theirs)
    gae = named(lhpd / "tests" / "test_gae.py", ["compute_gae_for_loop"], {"jnp": np})["compute_gae_for_loop"]

    inputs, kl_coef, runs = rollout(30), 0.15, {}
    theirs["self"] = SimpleNamespace(kl_ctl=SimpleNamespace(value=kl_coef))
    at = {name: array.astype(np.float32) for name, array in inputs.items()}
    rewards, _, _ = theirs["compute_rewards"](at["scores"], at["old_logprobs"], at["ref_logprobs"])
    for whiten_rewards in (True, False):
        x = {name: tensor.as_subclass(WithShape) for name, tensor in tensors(inputs).items()}
        new = {"logprobs": x["new_logprobs"].requires_grad_(), "values": x["new_values"].requires_grad_()}
        new["entropies"] = torch.zeros(B, T)
        ppo = SimpleNamespace(whiten_rewards=whiten_rewards, gamma=CLIP["gamma"], lam=CLIP["lam"], cliprange=CLIP["clip_range"])
        ppo.cliprange_value, ppo.vf_coef = CLIP["value_clip_range"], CLIP["value_coef"]
        trainer = SimpleNamespace(
            hparams=SimpleNamespace(ppo=ppo, task=SimpleNamespace(response_length=T)),
            policy=SimpleNamespace(analyze_responses_op=lambda queries, responses, new=new: new),
        )
        data = {"queries": None, "responses": None, "values": x["old_values"], "logprobs": x["old_logprobs"]}
        loss, stats = theirs["loss"](trainer, data | {"rewards": torch.tensor(rewards).as_subclass(WithShape)})
        gradients = torch.autograd.grad(loss, [new["logprobs"], new["values"]])
        runs["whitened_rewards" if whiten_rewards else "plain_rewards"] = {
            "stats": {name: numbers(value) for name, value in stats.items() if name != "policy/entropy"},
            "gradient_of_logprobs": numbers(gradients[0]),
            "gradient_of_values": numbers(gradients[1]),
        }

    settings = {"kl_coef": 0.15, "target": 6.0, "horizon": 10000, "episodes": 512}
    kls = [0.0, 6.0, 7.2, 100.0, -3.0, *np.round(np.random.default_rng(31).normal(6, 1.5, 15), 6).tolist()]
    alone = [theirs["AdaptiveKLController"](settings["kl_coef"], SimpleNamespace(**settings)) for _ in kls]
    for controller, kl in zip(alone, kls, strict=True):
        controller.update(kl, settings["episodes"])
    running, path = theirs["AdaptiveKLController"](settings["kl_coef"], SimpleNamespace(**settings)), []
    for kl in kls:
        running.update(kl, settings["episodes"])
        path.append(float(running.value))
    x = tensors(inputs)["old_values"].as_subclass(WithShape)
    return described(
        "Rewards, whitening, GAE, both losses with gradients, and the KL controller of openai/lm-human-preferences; GAE also "
        "by vwxyzjn/lm-human-preference-details",
        "functions of the repositories, run; TensorFlow 1's ops stood in for by PyTorch functions of the same meaning",
    ) | {
        "settings": CLIP | {"kl_coef": kl_coef},
        "inputs": {name: numbers(array) for name, array in inputs.items()},
        "rewards": numbers(rewards),
        "advantages": numbers(gae(rewards.astype(np.float64), inputs["old_values"], CLIP["gamma"], CLIP["lam"])),
        "advantages_discounted": numbers(gae(rewards.astype(np.float64), inputs["old_values"], 0.9, 0.8)),
        "whitened_values": numbers(utils.whiten(x)),
        "values_of_unit_variance": numbers(utils.whiten(x, shift_mean=False)),
        "runs": runs,
        "kl_controller": settings | {"kl": kls, "after_one": [float(c.value) for c in alone], "in_sequence": path},
    }


# ---------------------------------------------------------------------------------------------------------- N+ details

EOS, PAD = 1, 0


def n_plus_details(repository: Path) -> dict:
    """Ragged responses: four end with EOS, the first after one token, the others run to the last column."""
    path = repository / "summarize_from_feedback_details" / "ppo_left_padding_new.py"
    functions = ["masked_mean", "masked_var", "masked_whiten", "first_true_indices", "truncate_response"]
    base = named(path, functions, {"torch": torch, "INVALID_LOGPROB": 1.0})
    inputs = rollout(32)
    tokens = np.random.default_rng(33).integers(2, 9, (B, T))
    for row, column in enumerate((0, 2, 4, T - 1)):
        tokens[row, column] = EOS
    runs = {}
    for name, whiten_rewards, value_is_score in [
        ("plain_rewards", False, False),
        ("whitened_rewards", True, False),
        ("value_after_eos_is_the_score", False, True),
    ]:
        x = tensors(inputs)
        ppo = SimpleNamespace(kl_coef=0.05, whiten_rewards=whiten_rewards, gamma=CLIP["gamma"], lam=CLIP["lam"])
        ppo.cliprange, ppo.cliprange_value, ppo.vf_coef = CLIP["clip_range"], CLIP["value_clip_range"], CLIP["value_coef"]
        args = SimpleNamespace(ppo=ppo, non_eos_penalty=True, penalty_reward_value=-1, truncate_token_id=EOS)
        tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
        responses = torch.tensor(tokens)
        truncated = base["truncate_response"](args, tokenizer, responses)
        lengths = base["first_true_indices"](truncated == PAD) - 1
        values = x["old_values"].clone()
        if value_is_score:
            for row in range(3):
                values[row, lengths[row] + 1] = x["scores"][row]
        space = base | {
            "args": args, "tokenizer": tokenizer, "responses": responses, "postprocessed_responses": truncated,
            "sequence_lengths": lengths, "scores": x["scores"], "logprobs": x["old_logprobs"],
            "ref_logprobs": x["ref_logprobs"], "values": values, "accelerator": SimpleNamespace(print=lambda *_: None),
        }  # fmt: skip
        statements(path, "contain_eos_token = torch.any(postprocessed", "return_mean, return_var", space)
        new_logprobs, new_values = x["new_logprobs"].requires_grad_(), x["new_values"].requires_grad_()
        space |= {
            "micro_batch_inds": torch.arange(B), "context_length": 1, "new_logprobs": new_logprobs,
            "vpred_temp": torch.cat([new_values, new_values[:, :1]], dim=1)[..., None], "mb_values": space["values"],
            "mb_return": space["returns"], "mb_advantage": space["advantages"], "mb_logprobs": space["logprobs"],
        }  # fmt: skip
        statements(path, "new_logprobs = torch.masked_fill(", "accelerator.backward", space)
        gradients = torch.autograd.grad(space["loss"], [new_logprobs, new_values])
        runs[name] = {
            "scores": numbers(space["scores"]),
            "rewards": numbers(space["rewards"]),
            "advantages": numbers(space["advantages"]),
            "returns": numbers(space["returns"]),
            "policy_loss": numbers(space["pg_loss"]),
            "value_loss": numbers(space["vf_loss"]),
            "policy_clip_fraction": numbers(space["pg_clipfrac"]),
            "value_clip_fraction": numbers(space["vf_clipfrac"]),
            "approxkl_over_padding_too": numbers(0.5 * (space["logprobs_diff"] ** 2).mean()),
            "gradient_of_logprobs": numbers(gradients[0]),
            "gradient_of_values": numbers(gradients[1]),
        }
    return described(
        "Rewards, whitening, GAE and both losses of ppo_left_padding_new.py of vwxyzjn/summarize_from_feedback_details (N+) on "
        "ragged responses",
        "the script's own functions, and its statements from 'contain_eos_token' to 'advantages' and of the loss, run",
    ) | {
        "settings": CLIP | {"kl_coef": 0.05, "unfinished_score": -1.0, "eos": EOS},
        "responses": tokens.tolist(),
        "inputs": {name: numbers(array) for name, array in inputs.items()},
        "runs": runs,
    }


# ---------------------------------------------------------------------------------------------------- TensorFlow's Adam


def tf_adam(lhpd: Path) -> dict:
    """TRL's SFT again, with the optimizer of lm-human-preference-details: the form of epsilon that TensorFlow 1 has."""
    path = lhpd / "lm_human_preference_details" / "train_policy_accelerate.py"
    types = {"List": list, "Optional": Optional, "Tensor": torch.Tensor}
    space = types | {"_get_value": lambda x: x.item(), "_dispatch_sqrt": math.sqrt}
    step = named(path, ["_single_tensor_adam"], space)["_single_tensor_adam"]

    class TensorFlowAdam(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state |= {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                    apply(p, p.grad, state, group["lr"])

    def apply(p, grad, state, lr):
        beta1, beta2 = TF_ADAM["betas"]
        step(
            [p], [grad], [state["m"]], [state["v"]], [], [state["step"]], None, None, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=lr, weight_decay=0.0, eps=TF_ADAM["eps"], maximize=False, capturable=False, differentiable=False,
        )  # fmt: skip

    first = {}
    for gradient in (1e-3, 1e-5, 1e-7):
        p = torch.zeros(1, dtype=torch.float64)
        state = {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        apply(p, torch.full_like(p, gradient), state, 1.0)
        first[str(gradient)] = trl_losses.rounded(-p.item())
    return trl_losses.sft(TF_ADAM, TensorFlowAdam) | {
        "what": "SFTTrainer of TRL with the Adam of vwxyzjn/lm-human-preference-details, which has TensorFlow 1's epsilon",
        "how": "benchmarks/outsiders/ppo_references.py, float32 on one CPU thread; its docstring has the command",
        "first_step_at_gradient": first,
    }


def described(what: str, how: str) -> dict:
    return {
        "what": what,
        "how": f"benchmarks/outsiders/ppo_references.py, float32: {how}",
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
