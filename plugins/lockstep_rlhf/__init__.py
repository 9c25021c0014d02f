"""The recipe, written once for every backend: pretraining, SFT, reward modelling, PPO; sources of reward.

language_modelling.py   pretraining on raw text, SFT on demonstrations
reward_modelling.py     a reward model from rankings of K completions
ppo.py                  PPO against it, with KL penalty and PPO-ptx
reward_models/          what gives scores: a learned model, a Python function, a server, an ensemble
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
            "learned": "lockstep_rlhf.reward_models.learned:Learned",
            "function": "lockstep_rlhf.reward_models.function:Function",
            "endpoint": "lockstep_rlhf.reward_models.endpoint:Endpoint",
            "ensemble": "lockstep_rlhf.reward_models.ensemble:Ensemble",
        },
    },
)
