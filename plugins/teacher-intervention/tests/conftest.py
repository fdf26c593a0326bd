"""Lets the tests import `ti_steps` and `ti_families`, and other processes too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
