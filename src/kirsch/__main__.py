"""Run the `kirsch` command: `python -m kirsch`."""

import sys

from kirsch.cli.start import main

sys.exit(main())
