"""Score ChronoMoE on a task of fev. For its leaderboard, see ``fev_models/chronomoe`` beside this file."""

import tempfile
from importlib.resources import files

import fev
import pandas as pd

from chronomoe.integrations.fev import ChronoMoEModel


def main() -> None:
    wide = pd.read_parquet(str(files("chronomoe") / "assets/demo/pedestrians.parquet")).iloc[-1000:, :4]
    rows = [{"id": name, "timestamp": wide["timestamp"].tolist(), "target": wide[name].tolist()} for name in wide][1:]
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pd.DataFrame(rows).to_parquet(file.name)
        levels = [0.1, 0.5, 0.9]
        task = fev.Task(file.name, horizon=24, num_windows=2, seasonality=24, eval_metric="WQL", quantile_levels=levels)
        model = ChronoMoEModel("tiny")
        summary = task.evaluation_summary(model.fit_predict(task), "tiny", inference_time_s=model.inference_time)
    print({name: summary[name] for name in ("model_name", "WQL", "horizon", "num_windows", "inference_time_s")})


if __name__ == "__main__":
    main()
