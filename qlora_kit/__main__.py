"""`python -m qlora_kit`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
