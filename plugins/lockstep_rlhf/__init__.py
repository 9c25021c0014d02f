"""The recipe, written once for every backend: pretraining, SFT, reward modelling, PPO; learned and function rewards.

language_modelling.py   pretraining on raw text, SFT on demonstrations
reward_modelling.py     a reward model from rankings of K completions
ppo.py                  PPO against it, with KL penalty and PPO-ptx
reward_models.py        what gives scores: a learned model, a Python function
"""

from lockstep.registry import Plugin

plugin = Plugin(
    components={
        "algorithm": {
            "pretrain": "lockstep_rlhf.language_modelling:Pretraining",
            "sft": "lockstep_rlhf.language_modelling:SFT",
            "reward_modelling": "lockstep_rlhf.reward_modelling:RewardModelling",
            "ppo": "lockstep_rlhf.ppo:PPO",
        },
        "reward_model": {
            "learned": "lockstep_rlhf.reward_models:Learned",
            "function": "lockstep_rlhf.reward_models:Function",
        },
    },
)
