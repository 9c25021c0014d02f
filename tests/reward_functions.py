"""Rewards for tests of reward_model=function."""


def shortness(prompts, responses):
    return [-0.1 * len(response.split()) for response in responses]
