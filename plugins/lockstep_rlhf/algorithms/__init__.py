"""The algorithms, one file each. Pretraining and SFT share `language_modelling`.

pretraining.py               next-token prediction on raw text
sft.py                       supervised fine-tuning on demonstrations
reward_modelling.py          a reward model from rankings of K completions
ppo.py                       PPO against a reward model, with KL penalty and PPO-ptx
policy_gradient.py           policy gradients without a value network: GRPO and its relatives
rejection_sampling.py        fine-tuning on the best of k samples
preference_losses.py         the losses of preference methods
preference_optimisation.py   a policy from rankings: DPO and its relatives
online_preferences.py        preference optimisation on the policy's own samples
distillation.py              a policy from a teacher policy
"""
