"""`python -m mlpdsl`: the command line."""

import sys

from mlpdsl.cli import main

if __name__ == "__main__":
    sys.exit(main())
