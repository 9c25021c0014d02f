"""The Python API, a file per subject; `lockstep` exports its names. Nothing here decides a result: it assembles what the rest
of the core and the plugins compute.

items.py      prompts, demonstrations and comparisons from plain Python
sources.py    where models are opened from and saved to
sampling.py   responses of a policy, whole or streamed
policies.py   load or make a policy, chat with it, save it
scorers.py    a trained reward model; a Python function as a reward
training.py   train by any algorithm
results.py    run an experiment; runs as data frames
"""
