"""`python -m kegfast`."""

import sys

from kegfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
