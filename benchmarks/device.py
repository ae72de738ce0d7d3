"""What one device makes of this project, and of PyTorch, in six minutes.

    python benchmarks/device.py [--only training/mlp ...] [--seconds 1] [--limit 350] [--dtype float32] [--tiny]

Prints a JSON object a line for every case, the most important ones first; of a case that fails, its error. Needs jax,
flax, optax and numpy, and for the baselines torch and transformers; what is missing costs the cases that need it alone.
What six minutes do not reach, `--only` does. `performance.py` makes the tables of docs/performance.md of such lines.

    device       what it is, and its rates: a large product, a copy
    training     both variants of the paper; PyTorch as the original has it
    captioning   beams of 5, 20 tokens; the original's loop, and transformers' `generate`
    parity       logits, gradients and captions of the original's own tensors (tests/data/original); steps repeated
    training/... compiled: by `torch.compile`
    towers       uint8 pixels to embeddings
    variants     other forms of what these compute, each one change (variants.py)
    lengths      training on each length that captions of COCO are padded to

`seconds` are the median of several calls, `spread` their fastest and slowest. `floor` are the least seconds that the
products, and where it binds the memory, would take at the device's own rates, and `share` is floor / seconds. `peak`
is in bytes: the compiler's, of one program, where it is ours; of all that torch held where it is theirs. `compile` is
in seconds, with as many programs compiled at once as `at_once` says.
"""

import argparse
import gc
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cases import Case

ROOT = Path(__file__).parents[1]
COMPILED_AT_ONCE = max(2, (os.cpu_count() or 1) // 2)  # programs

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="START", help="cases whose names start so")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each case is measured, at least one call")
    parser.add_argument("--limit", type=float, default=350.0, help="seconds after which it ends")
    parser.add_argument("--case-limit", type=float, default=90.0, help="for one case, or to compile those of a part")
    parser.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="[bfloat16; on CPUs float32]")
    parser.add_argument("--commit", default="", help="of the code, where there is no git to ask")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--skip", help=argparse.SUPPRESS)  # cases that are done: this process is the one that works
    arguments = parser.parse_args()
    if arguments.skip is None:
        supervise(sys.argv[1:], arguments.limit, arguments.case_limit)
        return
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    import jax
    from cases import Settings, cases

    jax.config.update("jax_enable_compilation_cache", arguments.tiny)  # a program from there seems to take no time
    settings = Settings(arguments.seconds, arguments.dtype, arguments.tiny, arguments.commit)
    chosen = [case for case in cases(settings) if case.name.startswith(tuple(arguments.only))]
    run_cases(chosen, set(map(int, filter(None, arguments.skip.split(",")))), show, 0.8 * arguments.case_limit)
    sys.stdout.flush()
    os._exit(0)  # without waiting for what still compiles, and whatever libraries do at the end


def end_with_supervisor() -> None:
    sys.stdin.read()  # of which there is none, but for its end
    os._exit(1)


def show(line: Line) -> None:
    print(json.dumps(line), flush=True)


def supervise(arguments: Sequence[str], limit: float, case_limit: float) -> None:
    """Run the cases in another process, and start it anew behind one that it dies of or that takes too long."""
    end = time.monotonic() + limit
    done: set[int] = set()
    while True:
        lines: queue.Queue[str | None] = queue.Queue()
        worker = start_worker([*arguments, f"--skip={','.join(map(str, done))}"], lines)
        running, fault = {-1: "start"}, ""  # cases by their numbers
        try:
            while text := lines.get(timeout=max(0.1, min(case_limit, end - time.monotonic()))):
                line = json.loads(text)
                if "begin" in line:
                    running = {int(number): name for number, name in line["begin"].items()}
                    done |= set(running)
                else:
                    running = {}
                    show(line)
            worker.wait(timeout=10)
        except (queue.Empty, subprocess.TimeoutExpired):
            fault = f"not finished after {case_limit:.0f} seconds"
            if time.monotonic() >= end:
                fault = f"not finished after {limit:.0f} seconds in all; what follows was not begun"
        finally:
            worker.kill()
            worker.wait()
        if worker.returncode == 0:
            return
        for name in running.values():
            show({"case": name, "error": fault or f"the process died: exit status {worker.returncode}"})
        if time.monotonic() >= end:
            return
        if -1 in running:
            sys.exit(1)


def start_worker(arguments: Sequence[str], lines: "queue.Queue[str | None]") -> "subprocess.Popen[str]":
    """A process whose JSON lines arrive in the queue, and None at its end; its other output goes to standard error."""
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch is on the same device
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    worker = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,  # whose end tells it that this process is no more
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )

    def read() -> None:
        assert worker.stdout is not None
        assert worker.stdin is not None
        with worker.stdin, worker.stdout:
            for text in worker.stdout:
                if text.startswith(('{"case": ', '{"begin": ')):
                    lines.put(text)
                else:  # a library's
                    sys.stderr.write(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return worker


def run_cases(
    chosen: Sequence["Case"], done: Collection[int], emit: Callable[[Line], None], compile_limit: float = 75.0
) -> None:
    """Run the cases whose numbers are not `done`, part by part: first a part's programs are compiled, several at once,
    and nothing is measured meanwhile. What still compiles after `compile_limit` seconds is given up."""
    began = time.monotonic()
    left = [(number, case) for number, case in enumerate(chosen) if number not in done]
    for _, part in itertools.groupby(left, key=lambda numbered: numbered[1].name.split("/")[0]):
        members = dict(part)
        compiled = compile_all({number: case for number, case in members.items() if case.lower}, emit, compile_limit)
        for number, case in members.items():
            emit({"begin": {number: case.name}})
            line = attempt(run_case, case, compiled.pop(number, None))
            emit({"case": case.name, "at": round(time.monotonic() - began, 1), **line})
            gc.collect()
            if torch := sys.modules.get("torch"):
                torch.cuda.empty_cache()


def compile_all(cases: dict[int, "Case"], emit: Callable[[Line], None], limit: float) -> dict[int, Any]:
    """Futures of programs with their seconds, or a line with an error, by the cases' numbers."""
    emit({"begin": {number: case.name for number, case in cases.items()}})
    pool = ThreadPoolExecutor(COMPILED_AT_ONCE)
    # Traced one at a time, as variants change the code meanwhile.
    begun = {number: attempt(begin_compiling, pool, case) for number, case in cases.items()}
    _, late = wait([future for future in begun.values() if isinstance(future, Future)], timeout=limit)
    pool.shutdown(wait=False, cancel_futures=True)
    slow = {"error": f"not compiled after {limit:.0f} seconds"}
    return {number: slow if any(future is one for one in late) else future for number, future in begun.items()}


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or a line with its error, whose traceback goes to standard error."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def begin_compiling(pool: ThreadPoolExecutor, case: "Case") -> "Future[tuple[Any, float]]":
    assert case.lower
    return pool.submit(timed_compile, case.lower(), case.options)


def timed_compile(lowered: Any, options: dict[str, Any] | None) -> tuple[Any, float]:
    start = time.monotonic()
    return lowered.compile(compiler_options=options), time.monotonic() - start


def run_case(case: "Case", compiled: Any) -> Line:
    if case.lower is None:
        return case.run()
    if isinstance(compiled, dict):
        return compiled  # the error of tracing it
    program, seconds = compiled.result()
    peak = getattr(program.memory_analysis(), "peak_memory_in_bytes", None)
    return {**case.run(program), "compile": round(seconds, 1), "at_once": COMPILED_AT_ONCE, "peak": peak}


if __name__ == "__main__":
    main()
