"""The recipe, written once for every backend: pretraining, SFT, reward modelling, PPO, and sources of reward.

algorithms/      pretraining, SFT, reward modelling, PPO, policy gradients (GRPO),
                 offline and online preference optimisation (DPO), rejection sampling (RAFT), distillation
reward_models/   sources of scores: a learned model, a Python function, a server, a judge, checkers, combinations
environments/    for conversations with a policy: tools, a search index, the target of an attacker
labelers/        rank fresh responses: a reward model
attackers/       write attacks: templates, a policy
"""

from lockstep.registry import Plugin

plugin = Plugin(
    components={
        "algorithm": {
            "pretrain": "lockstep_rlhf.algorithms.pretraining:Pretraining",
            "sft": "lockstep_rlhf.algorithms.sft:SFT",
            "reward_modelling": "lockstep_rlhf.algorithms.reward_modelling:RewardModelling",
            "ppo": "lockstep_rlhf.algorithms.ppo:PPO",
            "preference_optimisation": "lockstep_rlhf.algorithms.preference_optimisation:PreferenceOptimisation",
            "online_preferences": "lockstep_rlhf.algorithms.online_preferences:OnlinePreferences",
            "rejection_sampling": "lockstep_rlhf.algorithms.rejection_sampling:RejectionSampling",
            "policy_gradient": "lockstep_rlhf.algorithms.policy_gradient:PolicyGradient",
            "distillation": "lockstep_rlhf.algorithms.distillation:Distillation",
        },
        "environment": {
            "tools": "lockstep_rlhf.environments.tools:Tools",
            "search": "lockstep_rlhf.environments.search:Search",
            "target": "lockstep_rlhf.environments.target:Target",
        },
        "labeler": {"scores": "lockstep_rlhf.labelers.scores:Scores"},
        "attacker": {
            "templates": "lockstep_rlhf.attackers.templates:Templates",
            "policy": "lockstep_rlhf.attackers.policy:PolicyAttacker",
        },
        "reward_model": {
            "learned": "lockstep_rlhf.reward_models.learned:Learned",
            "function": "lockstep_rlhf.reward_models.function:Function",
            "endpoint": "lockstep_rlhf.reward_models.endpoint:Endpoint",
            "ensemble": "lockstep_rlhf.reward_models.ensemble:Ensemble",
            "sum": "lockstep_rlhf.reward_models.sum:Sum",
            "answer": "lockstep_rlhf.reward_models.answer:Answer",
            "pattern": "lockstep_rlhf.reward_models.pattern:Pattern",
            "length": "lockstep_rlhf.reward_models.length:Length",
            "code": "lockstep_rlhf.reward_models.code:Code",
            "judge": "lockstep_rlhf.reward_models.judge:Judge",
            "citations": "lockstep_rlhf.reward_models.citations:Citations",
            "attack": "lockstep_rlhf.reward_models.attack:AttackReward",
        },
    },
)
