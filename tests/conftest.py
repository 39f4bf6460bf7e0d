import sys
from pathlib import Path

for folder in ("unit", "e2e", "chaos"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
