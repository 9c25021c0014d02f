"""Environments that policies converse with: one contract, `lockstep.interfaces.Environment`.

tools.py    Python functions that the policy calls by name
search.py   an index that the policy searches for passages
target.py   a policy that an attacker talks to
"""
