"""Two workspaces whose folders have one name, in the processes that torchrun started; see test_run_in_processes.py."""

import sys
import time
from pathlib import Path

from chronomoe.stages.workspace import Workspace


def make(folder, report):
    time.sleep(1)
    (folder / "made").touch()


if __name__ == "__main__":
    for parent in ("first", "second"):
        stage = Workspace(Path(sys.argv[1]) / parent / "run").stage("slow", {}, make)
        assert (stage / "made").exists(), f"a process went on before {stage} was made"
