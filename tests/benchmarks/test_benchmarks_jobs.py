import json
import subprocess
import sys

import jobs
import pytest


@pytest.mark.slow
def test_jobs_are_measured_beside_their_parts() -> None:
    command = [sys.executable, jobs.__file__, "--sizes", "tiny", "--rounds", "1"]
    printed = subprocess.check_output(command, env=jobs.Bench("", "tiny", 1).environment(), text=True)

    lines = {line["case"]: line for line in map(json.loads, printed.splitlines())}
    assert list(lines) == ["device", "start/first", "start/second", "start/demo", "caption", "embed", "train"]
    assert 0 < lines["start/second"]["seconds"] < lines["start/first"]["seconds"]
    assert 0 < lines["start/demo"]["seconds"] <= lines["start/demo"]["spread"][1]
    for job, parts in {"caption": ["decoding", "search"], "embed": ["decoding", "tower"], "train": ["step"]}.items():
        assert list(lines[job]["parts"]) == parts
        assert lines[job]["share"] == lines[job]["rate"] / min(lines[job]["parts"].values())
