"""`python -m aaac_gguf` is `aaac-gguf`."""

import sys

from .cli import main

sys.exit(main())
