"""`python -m kirsch` is `kirsch`."""

import sys

from kirsch.cli.start import main

sys.exit(main())
