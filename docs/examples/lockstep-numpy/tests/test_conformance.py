"""Lockstep's conformance kit on this backend: the backend, its policy, and the algorithms, which do not know it."""

import pytest


@pytest.mark.conformance("backend", "numpy")
def test_the_backend(conformance):
    conformance()


@pytest.mark.conformance("policy", "decoder", backends=["numpy"])
def test_the_policy(conformance):
    conformance()


@pytest.mark.conformance("reward_model", "learned", backends=["numpy"])
def test_the_reward_model(conformance):
    conformance()


@pytest.mark.conformance("algorithm", "sft", backends=["numpy"])
def test_sft(conformance):
    conformance()


@pytest.mark.conformance("algorithm", "reward_modelling", backends=["numpy"])
def test_reward_modelling(conformance):
    conformance()


@pytest.mark.conformance("algorithm", "ppo", backends=["numpy"])
def test_ppo(conformance):
    conformance()
