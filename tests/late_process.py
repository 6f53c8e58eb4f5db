"""The command line, whose second process starts when the first has written its result; see test_run_in_processes.py."""

import os
import sys
import time
from pathlib import Path

from chronomoe.cli.app import main

if __name__ == "__main__":
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    while os.environ["RANK"] != "0" and not (out / "config.json").exists():
        time.sleep(0.1)
    main()
