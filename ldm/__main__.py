"""`python -m ldm` is the same as `ldm`."""

import sys

from ldm.cli import main

sys.exit(main())
