"""The fuzzer is a package of its own, run from the root of the repository; its tests import it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
