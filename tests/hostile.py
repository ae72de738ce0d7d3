"""What a file may hold that must not be run."""

import os
from pathlib import Path
from typing import Any


class Evil:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)
