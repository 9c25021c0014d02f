"""Rewards for tests of reward_model=function."""


def shortness(prompts, responses):
    return [-0.1 * len(response.split()) for response in responses]


def sometimes(prompts, responses):
    """A score for every other response."""
    return [float(i) if i % 2 else float("nan") for i in range(len(responses))]


def constant(prompts, responses):
    return [1.0] * len(responses)


def misspelt(prompts, responses, anwser):
    return [1.0] * len(responses)
