"""The modules under test are files of the repository's root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from workshop import argv, backbone, children, glue  # noqa: E402, F401  fixtures of all tests
