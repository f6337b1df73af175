"""The command `rmtension`, and its entry point `main`."""

from rmtension.cli._command_line import main

__all__ = ["main"]
