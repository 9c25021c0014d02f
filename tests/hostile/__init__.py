"""Hostile inputs. Each area has a strategy that makes inputs and a function that gives one to Lockstep:

    configuration   values and overrides, to the dry run
    rows            rows and files of data, to encoded examples
    run_folder      damaged run folders, to compare, the cache, resuming and the Python API
    checkpoints     damaged checkpoints and adapters, to the policies of both backends
    server          answers of a reward server, to scores

What must hold is in ``clear``, the values are in ``values``, the valid folders in ``folders``. ``tests/test_fuzz.py`` tries the
same inputs every time; ``benchmarks/fuzz.py`` tries new ones for as long as you like.
"""
