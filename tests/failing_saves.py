"""train.py whose first process cannot save once that of a step is there: `failing_saves.py STAGE STEP ...`."""

import errno
import inspect
import os
import pkgutil
import runpy
import sys
from pathlib import Path, PurePath
from typing import Any
from unittest import mock

from clipcap_jax import cluster

STAGES = {  # in the order in which a save gets to them
    "folder": "os.mkdir",
    "arrays": "orbax.checkpoint.handlers.PyTreeCheckpointHandler.async_save",
    "json": "orbax.checkpoint.handlers.JsonCheckpointHandler._save_fn",
    "rename": "orbax.checkpoint._src.path.atomicity.AtomicRenameTemporaryPath.finalize",
}


def failing(target: str, step: str) -> Any:
    """A patch of a function that fails for what lies in a folder `checkpoints` in which the step is."""
    owner, name = target.rsplit(".", 1)
    function = getattr(pkgutil.resolve_name(owner), name)

    def check(arguments: tuple[Any, ...]) -> None:
        paths = (getattr(one, "_tmp_path", one) for one in arguments)
        for path in (PurePath(path) for path in paths if isinstance(path, str | PurePath)):
            for folder in path.parents:
                if folder.name == "checkpoints" and Path(folder, step).exists() and cluster.is_main():
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a test")

    def fail(*arguments: Any, **options: Any) -> Any:
        check(arguments)
        return function(*arguments, **options)

    async def fail_later(*arguments: Any, **options: Any) -> Any:
        check(arguments)
        return await function(*arguments, **options)

    return mock.patch(target, fail_later if inspect.iscoroutinefunction(function) else fail)


if __name__ == "__main__":
    stage, step, *sys.argv[1:] = sys.argv[1:]
    with failing(STAGES[stage], step):
        runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
