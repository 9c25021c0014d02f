"""The algorithms, a file each; `language_modelling` is shared by pretraining and SFT.

pretraining.py        next-token prediction on raw text
sft.py                supervised fine-tuning on demonstrations
reward_modelling.py   a reward model from rankings of K completions
ppo.py                PPO against it, with KL penalty and PPO-ptx
"""
