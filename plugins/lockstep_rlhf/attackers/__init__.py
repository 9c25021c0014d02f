"""Attackers, which write attacks:

templates.py   fixed words around the goal, with or without a disguise
policy.py      a policy that is given the goal
"""
