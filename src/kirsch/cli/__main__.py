"""`python -m kirsch.cli` is `kirsch`."""

import sys

from kirsch.cli.start import main

sys.exit(main())
