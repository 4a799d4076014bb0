"""`python -m moonwhale` is `moonwhale`."""

import sys

from moonwhale.cli import main

sys.exit(main())
