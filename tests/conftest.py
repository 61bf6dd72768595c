"""The tests here import `house`, which lies beside them and is no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
