"""The command line, a file per command: `lockstep.cli` finds them here.

A command's name is its file's, with hyphens for underscores. Its module has:

    HELP                          one line for `lockstep --help`
    OVERRIDES                     True if Hydra overrides may follow the arguments
    add_arguments(parser)         declares the other arguments
    run(arguments, overrides)     runs the command; raises `LockstepError` for errors the user can fix

Slow imports go inside `run`, so that `lockstep --help` is fast.
"""
