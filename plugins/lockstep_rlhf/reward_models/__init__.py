"""Sources of scores: one contract, `lockstep.interfaces.RewardModel`.

learned.py    a model with a scalar head: a stage's, or a public one
function.py   a Python function by import path
endpoint.py   a server, by JSON over HTTP
ensemble.py   several of these as one
outside.py    shared by function and endpoint: retries and failures
"""
