"""Sources of scores: one contract, `lockstep.interfaces.RewardModel`.

learned.py    a model with a scalar head, from a stage or public
function.py   a Python function by import path
endpoint.py   a server, by JSON over HTTP
judge.py      a language model's opinion, from a chat server
answer.py     whether the answer equals the row's; mathematics.py and verifying.py compare by math-verify
code.py       whether the program passes the row's tests; running.py runs the program
pattern.py    whether a regular expression matches
length.py     the response's length
citations.py  whether the cited passages contain the answer
attack.py     whether an attack makes a target help with a goal
ensemble.py   an ensemble of reward models
sum.py        a weighted sum of reward models
outside.py    shared by function, endpoint and judge: retries and failures
server.py     shared by endpoint and judge: HTTP
"""
