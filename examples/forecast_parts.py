"""Forecast a folder of parts, on this machine or by the workers of a Ray cluster.

    python examples/forecast_parts.py runs/demo/moe parts forecasts [local|ray]

Run it again after a kill: finished parts stay. With RAY_ADDRESS set, the workers of that cluster share the work.
"""

import sys
from pathlib import Path

from chronomoe.predict.files import Forecaster
from chronomoe.predict.parts import predict_parts


def main(model: str, parts: str, out: str, engine: str = "local", *, horizon: int = 48) -> None:
    forecaster = Forecaster(model, horizon=horizon, levels=(0.1, 0.5, 0.9))
    rows = predict_parts(forecaster, Path(parts), Path(out), engine=engine)
    print(f"{rows} rows in {len(list(Path(out).glob('*.parquet')))} parts")


if __name__ == "__main__":
    main(*sys.argv[1:])
