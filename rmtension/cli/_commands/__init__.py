"""The commands of `rmtension`, one module each: `add_options(parser)`, and `run(options)`, which returns an `Outcome`.

No module here imports torch before a command runs, so that `rmtension --help` is fast.
"""
