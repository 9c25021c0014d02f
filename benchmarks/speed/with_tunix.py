"""Contestant: google-tunix's PPOLearner on one device, float32, with a separate critic and a reward model of the same size."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
from tunix.rl.utils import create_critic_model
from worker import SIZES, Contestant, Size, Work, texts

WARM_UP = 2


class Llama(llama.Llama3):
    """tunix 0.1.7 hands every model ``segment_ids``, which its Llama does not take; without packing they are None."""

    def __call__(self, *inputs: Any, segment_ids: Any = None, **named: Any) -> Any:
        return super().__call__(*inputs, **named)


def adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5, 0.9, 0.95))


def model_config(size: Size) -> llama.ModelConfig:
    return llama.ModelConfig(
        num_layers=size.layers,
        vocab_size=size.vocab_size + 2,  # its embedding must know EOS and padding
        embed_dim=size.hidden_size,
        hidden_dim=size.intermediate_size,
        num_heads=size.heads,
        head_dim=size.hidden_size // size.heads,
        num_kv_heads=size.kv_heads,
        rope_theta=10000,
        norm_eps=1e-6,
        weight_tying=False,  # its critic replaces an output layer of its own
    )


def cluster_config(work: Work, mesh: Any) -> rl_cluster.ClusterConfig:
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=adam(),
            critic_optimizer=adam(),
            eval_every_n_steps=10**9,
            max_steps=10**6,
            mini_batch_size=work.rows,
            train_micro_batch_size=work.rows,
            pbar_description=None,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=work.response,
            max_prompt_length=work.prompt,
            kv_cache_size=work.prompt + work.response + 1,
            temperature=1.0,
            top_p=None,
        ),
    )


def turns(contestant: Contestant, trained: tuple[nnx.Module, ...]) -> Iterator[dict[str, Any]]:
    """A batch per turn; asked for the next one, tunix has started the work on the last, which we wait for."""
    work = contestant.work
    for done in range(10**6):
        jax.block_until_ready([nnx.state(model) for model in trained])
        if done == WARM_UP:
            contestant.ready(jax=jax.__version__, tunix=importlib.metadata.version("google-tunix"))
        if done > WARM_UP:
            contestant.finished()
        if done >= WARM_UP:
            contestant.await_turn()
        yield {"prompts": np.array(texts(work.rows, work.prompt, done))}


def main() -> None:
    contestant = Contestant()
    work = contestant.work
    if contestant.device == "cuda":
        jax.config.update("jax_default_matmul_precision", "highest")  # not TF32, as no other contestant's float32 is
        contestant.peak_bytes = lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    config = model_config(SIZES[work.size])
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        actor, reference = (Llama(config, rngs=nnx.Rngs(0)) for _ in range(2))
        critic, reward = (create_critic_model(actor) for _ in range(2))
        cluster = rl_cluster.RLCluster(
            actor=actor,
            critic=critic,
            reference=reference,
            reward=reward,
            tokenizer=AutoTokenizer.from_pretrained(contestant.models / work.size / "policy"),
            cluster_config=cluster_config(work, mesh),
        )
        settings = ppo_learner.PPOConfig(num_iterations=work.epochs, beta=0.02, kl_method="kl")
        ppo_learner.PPOLearner(cluster, settings).train(turns(contestant, (actor, critic)))


if __name__ == "__main__":
    main()
