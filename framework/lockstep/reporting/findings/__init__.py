"""Published findings, reproduced: `lockstep reproduce NAME`.

finding     a file conf/finding/NAME.yaml: the sweep to run, and the criteria for each claim
criteria    when the criteria were written down, and when the runs began
outcomes    what the runs say about each claim, over seeds, on each backend
page        the page: each claim beside what was published
"""
