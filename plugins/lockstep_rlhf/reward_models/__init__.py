"""Sources of scores: one contract, `lockstep.interfaces.RewardModel`.

learned.py    a model with a scalar head: a stage's, or a public one
function.py   a Python function by import path
endpoint.py   a server, by JSON over HTTP
judge.py      a language model's opinion, from a chat server
answer.py     whether the answer is the row's; mathematics.py and verifying.py: as math-verify compares
code.py       whether the program passes the row's tests; running.py: what runs it
pattern.py    whether a regular expression matches
length.py     how long it is
citations.py  whether what it cites contains the answer
attack.py     whether it moves a target to help with a goal
ensemble.py   several of these as one
sum.py        several of these as a weighted sum
outside.py    shared by function, endpoint and judge: retries and failures
server.py     shared by endpoint and judge: HTTP
"""
