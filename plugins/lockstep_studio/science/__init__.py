"""What labels tell: of labelers, of policies, and how surely.

agreement.py       agreement beyond chance on any labels: raw, Cohen, Conger, Krippendorff, with bootstrap intervals
rankings.py        the same for preferences, ratings and flags of a round, per group and per pair of labelers
bradley_terry.py   strengths of policies from who was preferred to whom
screening.py       who fails gold items and attention checks
"""
