"""`python -m rmtension.cli`: the same as the command `rmtension`."""

import sys

from rmtension.cli._command_line import main

if __name__ == "__main__":
    sys.exit(main())
