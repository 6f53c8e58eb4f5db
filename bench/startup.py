"""How long does `chronomoe --help` take, against importing torch?"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

from answer import CLOCK, answer, in_turns, medians, ratio

HELP = [sys.executable, "-m", "chronomoe", "--help"]
TORCH = [sys.executable, "-c", "import torch"]


def run(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, capture_output=True, check=True)


def processor_seconds(command: list[str]) -> float:
    """Return the processor time of a process, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command)()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if CLOCK == "cpu":
        seconds: dict[str, list[float]] = {"help": [], "torch": []}
        for _ in range(options.repeats):
            seconds["help"].append(processor_seconds(HELP))
            seconds["torch"].append(processor_seconds(TORCH))
    else:
        seconds = in_turns({"help": run(HELP), "torch": run(TORCH)}, repeats=options.repeats)
    answer(
        "chronomoe --help against import torch",
        reach={"chronomoe --help against import torch": ratio(seconds, over="help", under="torch")},
        milliseconds=medians(seconds),
    )


if __name__ == "__main__":
    main()
