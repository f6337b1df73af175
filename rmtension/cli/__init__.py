"""The command `rmtension`."""

from rmtension.cli._command_line import main

__all__ = ["main"]
