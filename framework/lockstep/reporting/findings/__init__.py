"""Published findings, reproduced: `lockstep reproduce NAME`.

finding     a file conf/finding/NAME.yaml: the sweep to run, and criteria that say when a claim holds
criteria    when they were written down, and when the runs began
outcomes    what the runs say of each claim, over seeds, on each backend
page        the page: claim by claim, beside what was published
"""
