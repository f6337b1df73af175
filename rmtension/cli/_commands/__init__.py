"""The commands of `rmtension`, one module each: `add_options(parser)`, and `run(options)` which gives an `Outcome`.

Nothing here imports torch before a command runs, so that `rmtension --help` answers at once.
"""
