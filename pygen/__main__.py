"""`python -m pygen`: the command line."""

from __future__ import annotations

import sys

from pygen.workbench.command_line import main

if __name__ == "__main__":
    sys.exit(main())
