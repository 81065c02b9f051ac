"""``python -m lpattn`` is the command ``lpattn``."""

from __future__ import annotations

import sys

from lpattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
