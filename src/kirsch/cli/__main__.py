"""`python -m kirsch.cli` is `kirsch`."""

import sys

from kirsch.cli.app import main

sys.exit(main())
