"""The command line, a file per command: `lockstep.cli` finds them here.

A command's name is its file's, with hyphens for underscores. Its module has:

    HELP                          one line for `lockstep --help`
    OVERRIDES                     True where Hydra overrides may follow the arguments
    add_arguments(parser)         declares the others
    run(arguments, overrides)     does it; raises `LockstepError` for what the user can put right

A module imports what is slow inside `run`, so that `lockstep --help` is quick.
"""
