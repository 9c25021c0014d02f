# ---
# jupyter:
#   jupytext: {formats: 'py:percent,ipynb'}
# ---

# %% [markdown]
# # First steps
#
# A policy learns to answer from demonstrations, then to maximise a Python reward function, in a minute on a laptop. It starts
# from scratch and knows the few hundred words of the miniature. For a real model, replace `new_policy` with
# `lockstep.load("HuggingFaceTB/SmolLM2-135M-Instruct")`; the rest stays the same.

# %%
import lockstep

policy = lockstep.new_policy("torch", layers=2, hidden_size=32, intermediate_size=64)
questions = ["what colour is jarl ?", "where does dax live ?", "what does wug eat ?"]
policy.respond(questions, max_tokens=8)

# %% [markdown]
# That is noise. Supervised fine-tuning teaches the policy to answer, and when to stop. `train` returns a new policy and does not
# change the old one. The algorithm's keys are keyword arguments.

# %%
answers = [
    ("what colour is jarl ?", "jarl is gold ."),
    ("where does dax live ?", "dax lives in the lake ."),
    ("what does wug eat ?", "wug eats honey ."),
    ("what does wug eat ?", "wug eats plums ."),
]
tuned = lockstep.train(
    policy,
    "sft",
    demonstrations=answers,
    epochs=100,
    batch_size=4,
    optimizer={"learning_rate": 0.01},
)
tuned.metrics["loss"].iloc[[0, -1]]

# %%
tuned.respond(questions, seed=1)

# %% [markdown]
# Asked what wug eats, the policy says honey or plums. A reward is a function of prompts and responses. This one prefers plums.
# PPO learns that, and the KL penalty keeps the rest of the behaviour unchanged.


# %%
def reward(prompts, responses):
    return [1.0 if "plums" in response else 0.0 for response in responses]


better = lockstep.train(
    tuned,
    "ppo",
    prompts=["what does wug eat ?"],
    reward=reward,
    iterations=20,
    batch_size=16,
    kl_coef=0.05,
    value_network="shared",
    optimizer={"learning_rate": 0.003},
)
better.metrics[["objective/score", "objective/kl"]].iloc[[0, -1]]

# %%
food = {
    name: [p.chat("what does wug eat ?", seed=seed) for seed in range(8)] for name, p in [("before", tuned), ("after", better)]
}
print(food)

# %% [markdown]
# Stream a dialogue, and save the policy to a folder. transformers, `lockstep chat my-policy` and `lockstep.load` on either
# backend open it.

# %%
conversation = better.conversation()
for piece in conversation.say("what colour is jarl ?"):
    print(piece, end="", flush=True)

# %%
folder = better.save("my-policy")
again = lockstep.load(folder, "torch")
assert again.chat("what does wug eat ?", seed=3) == better.chat("what does wug eat ?", seed=3)
