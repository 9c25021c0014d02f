"""Rows that share prompts, and rows of much padding: what is computed once gives what each row has alone, without any padding."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lockstep.config.schema import parse
from lockstep.interfaces import Term
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder
from lockstep.text.sequences import Sequences, pack
from lockstep_jax import layers as jax_layers
from lockstep_jax.backend import JaxBackend
from lockstep_jax.policies import Decoder as JaxDecoder
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from lockstep_torch import attention
from lockstep_torch import layers as torch_layers
from lockstep_torch.backend import TorchBackend
from lockstep_torch.generation import generate
from lockstep_torch.model import Block
from lockstep_torch.policies import Decoder as TorchDecoder
from lockstep_torch.policies import _decoder
from lockstep_torch.transformers_network import TransformersNetwork

PAD, WORDS = 99, 40
SHAPE = small_decoder(
    vocab_size=WORDS, hidden_size=32, layers=3, heads=4, kv_heads=2, intermediate_size=64, context_length=512, rope_theta=1e4,
    tied=True,
)  # fmt: skip


def model(backend, **settings):
    weights = {name: 4 * array if array.ndim > 1 else array for name, array in initial_parameters(SHAPE, 3).items()}
    if backend == "torch":
        made = TorchBackend(parse(TorchBackend.Config, {"device": "cpu", **settings}, "backend"))
        return TorchDecoder.filled(_decoder(SHAPE), None, made, weights).with_value_head()
    made = JaxBackend(parse(JaxBackend.Config, {"device": "cpu", "compilation_cache": None, **settings}, "backend"))
    return JaxDecoder.from_arrays(SHAPE, weights, made, language_head=True).with_value_head()


def rows_of(prompts, responses, prompt_columns=None, response_columns=None) -> Sequences:
    """``prompts``: (tokens, neighbouring rows) of each; ``responses``: tokens of each row."""
    rng = np.random.default_rng(0)
    asked = [(rng.integers(0, WORDS, length).tolist(), times) for length, times in prompts]
    every = [ids for ids, times in asked for _ in range(times)]
    answers = [rng.integers(0, WORDS, length).tolist() for length in responses]
    return pack(every, answers, PAD, prompt_columns=prompt_columns, response_columns=response_columns)


CASES = {
    "groups of 3": rows_of([(6, 3), (2, 3)], [4, 1, 5, 2, 5, 3], 9, 5),
    "pairs, no padding": rows_of([(5, 2), (5, 2)], [4, 4, 4, 4]),
    "one prompt for all": rows_of([(7, 4)], [1, 2, 3, 4], 8, 6),
    "an empty response": rows_of([(6, 2), (3, 2)], [0, 4, 3, 0], 6, 6),
    "much padding": rows_of([(2, 1), (9, 1), (3, 1), (1, 1)], [1, 8, 2, 3], 12, 10),
    "prompts of one token": rows_of([(1, 1), (1, 1), (1, 1)], [2, 1, 6], 8, 8),
    "groups of one-token prompts": rows_of([(1, 2), (1, 2)], [2, 1, 6, 3], 8, 8),
    "long rows": rows_of([(250, 2), (20, 2)], [10, 3, 7, 9], 260, 12),
    "long rows, a stream would be slower": rows_of([(150, 2), (20, 2)], [140, 3, 70, 90], 160, 150),
}


def once(case, backend) -> bool:
    """Whether anything is computed once there."""
    rows = CASES[case]
    if backend == "torch":
        return Block.put(rows, model("torch").backend).layout is not None
    return rows.rows_per_prompt > 1


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("case", CASES)
def test_rows_have_the_outputs_and_gradients_that_each_has_alone(case, backend, settings):
    rows, policy = CASES[case], model(backend, **settings)
    alone = [bare(rows, i) for i in range(rows.rows)]
    found = policy.evaluate(rows, ["logprobs", "entropy", "values"])
    for name, array in found.items():
        for i, each in enumerate(alone):
            if real := each.mask.shape[1] if each.mask.any() else 0:
                expected = policy.evaluate(each, [name])[name][0, :real]
                np.testing.assert_allclose(array[i, :real], expected, atol=2e-5, err_msg=f"{name} of row {i}")
    learner = policy.backend.learner({"policy": policy}, {"policy": OptimizerConfig()})
    weights = np.random.default_rng(1).normal(size=rows.mask.shape).astype(np.float32) * rows.mask
    terms = [Term(NextTokenLoss(), rows, {"mask": rows.mask, "weights": weights})]
    one_by_one = [
        Term(NextTokenLoss(), each, {"mask": each.mask, "weights": weights[i : i + 1, : each.mask.shape[1]]})
        for i, each in enumerate(alone)
        if each.mask.any()
    ]
    together, apart = learner.gradients(terms), learner.gradients(one_by_one)
    for name, gradient in apart.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(together[name], gradient, atol=2e-5 * scale, err_msg=name)


def bare(rows: Sequences, i: int) -> Sequences:
    """A row without its padding, but for a column of an empty response."""
    one = rows.take(slice(i, i + 1))
    first, last = int(np.argmax(one.prompt_mask[0])), max(1, int(one.response_mask[0].sum()))
    columns = slice(first, rows.prompt_length + last)
    return Sequences(one.tokens[:, columns], one.prompt_mask[:, first:], one.response_mask[:, :last], one.mask[:, :last])


def test_the_cases_are_what_they_say():
    expected = {
        "torch": {"pairs, no padding", "groups of 3", "one prompt for all", "an empty response", "much padding",
                  "prompts of one token", "groups of one-token prompts", "long rows"},
        "jax": {"pairs, no padding", "groups of 3", "one prompt for all", "an empty response", "groups of one-token prompts",
                "long rows", "long rows, a stream would be slower"},
    }  # fmt: skip
    assert {b: {case for case in CASES if once(case, b)} for b in expected} == expected


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_prompt_goes_through_the_layers_once(backend, monkeypatch):
    """Of 2 prompts of 8 columns with 4 rows each, and responses of 4: 48 tokens, where every row for itself would be 96."""
    rows, seen = rows_of([(8, 4), (8, 4)], [4] * 8), []
    if backend == "torch":
        real = torch_layers.MLP.forward
        monkeypatch.setattr(torch_layers.MLP, "forward", lambda self, x: seen.append(x.shape[:-1].numel()) or real(self, x))
        tokens = [48, 48, 34]  # in the last layer, prompts give only keys and values, but for their last column
    else:
        real = jax_layers.MLP.__call__
        monkeypatch.setattr(jax_layers.MLP, "__call__", lambda self, x: seen.append(x.size // x.shape[-1]) or real(self, x))
        jax.clear_caches()
        tokens = [16, 32, 16, 32, 2, 32]  # of prompts, of responses
    model(backend).evaluate(rows, ["logprobs"])
    assert seen == tokens


def test_padding_goes_through_no_layer(monkeypatch):
    rows, seen = CASES["much padding"], []
    real = torch_layers.MLP.forward
    monkeypatch.setattr(torch_layers.MLP, "forward", lambda self, x: seen.append(x.shape[:-1].numel()) or real(self, x))
    model("torch").evaluate(rows, ["logprobs"])
    tokens = int(rows.attention_mask.sum())
    assert seen == [tokens, tokens, tokens - int(rows.prompt_mask[:, :-1].sum())]


def test_what_is_spread_and_picked_has_torchs_gradients():
    places, x = torch.tensor([0, 3, 4]), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention._Spread.apply(x, places, 6), x)
    wide = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention._Picked.apply(x, places), wide)
    assert torch.equal(attention._Picked.apply(attention._Spread.apply(x, places, 6), places), x)


SMALL = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64,
)  # fmt: skip
OF_TRANSFORMERS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_networks_of_transformers_draw_the_same_from_prompts_read_once(name):
    """Whatever their caches keep: keys, those of a window, or states, which transformers does not repeat."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **OF_TRANSFORMERS[name])).eval()
    network, rng = TransformersNetwork(hf), np.random.default_rng(0)
    prompts, mask = torch.tensor(rng.integers(0, WORDS, (2, 7))), torch.ones(2, 7, dtype=torch.bool)
    seeds = torch.tensor(rng.integers(-(2**31), 2**31 - 1, (6, 5)), dtype=torch.int32)
    how = {"temperature": 1.0, "stop_ids": (), "pad_id": 0, "past": None}
    with torch.no_grad():
        once = generate(network, prompts, mask, seeds, **how)
        apart = generate(network, prompts.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), seeds, **how)
    assert (once.tokens == apart.tokens).all()
    np.testing.assert_allclose(once.logprobs, apart.logprobs, atol=1e-5)
