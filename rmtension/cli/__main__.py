"""`python -m rmtension.cli`: the command, where it is not installed."""

import sys

from rmtension.cli._command_line import main

if __name__ == "__main__":
    sys.exit(main())
