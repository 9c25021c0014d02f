"""Statistics of labels: how far labelers agree, how strong policies are, and how certain that is.

agreement.py       agreement beyond chance on any labels: raw, Cohen, Conger, Krippendorff, with bootstrap intervals
rankings.py        the same for preferences, ratings and flags of a round, per group and per pair of labelers
bradley_terry.py   strengths of policies from pairwise preferences
screening.py       labelers who fail gold items or attention checks
"""
