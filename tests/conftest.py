import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import needs
import pytest

# JAX reads these when it is first imported, which the imports of the tests do after this file. As environment variables
# they also reach the scripts that tests start as processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# By default XLA ends a process of which one device has waited a minute for another: on a busy machine too early.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600")
# Nearly all of the tests' time is compilation, and the same programs are compiled by many tests and by their processes.
# Each worker of pytest-xdist keeps its own, as JAX reads what another process is still writing.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

pytest_plugins = ["tiny", "buckets", "web"]

# No time limit, as an example may compile something; the same examples in every run, so that green stays green.
hypothesis.settings.register_profile("clipcap", deadline=None, derandomize=True)
hypothesis.settings.load_profile("clipcap")


def pytest_configure() -> None:
    needs.check_expected()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Every program takes several mappings of memory, of which Linux allows a process 65,530 (`vm.max_map_count`). With
    those of all modules a worker would reach that, and XLA crashes there."""
    import jax  # not before the variables above are set

    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos, captions and reference tensors that are too large, or not ours, to ship."""
    if not (folder := os.environ.get("CLIPCAP_SHARED")):
        pytest.skip("set CLIPCAP_SHARED to the folder with the real data and the reference tensors to run this")
    if not Path(folder).is_dir():
        pytest.fail(f"CLIPCAP_SHARED is {folder}, which is not a folder")
    return Path(folder)
