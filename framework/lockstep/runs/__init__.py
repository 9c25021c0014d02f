"""Experiments: their stages, what identifies them, where results live, and the loop that trains.

components.py          groups of the configuration become components
stages.py, rounds.py   one stage; stages that repeat
kinds.py               what each kind of stage needs, checked
identity.py, store.py  what decides a result; the folders that hold it
experiment.py          a whole configuration, checked, with identities and folders
assembly.py            backend, tokenizer, data, models and algorithm of a stage, on first use
loop.py                training: step, log, checkpoint
evaluation.py          policies on held-out prompts; with likelihood.py, reward_model_accuracy.py and measures.py
collection.py          fresh responses for labelers
attacks.py             attacks on policies
runner.py              the stages in order: reuse, resume, record
"""
