"""A file in, forecasts out."""

from collections.abc import Sequence
from pathlib import Path

from chronomoe.data.frames import read_frame
from chronomoe.data.series import TARGET
from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.stages.commands import check_file_out
from chronomoe.stages.workspace import whole_file


def predict_file(
    model: str,
    file: Path,
    *,
    horizon: int,
    out: Path,
    future: Path | None = None,
    target: Sequence[str] | None = None,
    freq: str | None = None,
    levels: Sequence[float] = (0.1, 0.5, 0.9),
    batch_size: int = 256,
) -> int:
    """Forecast every series of a file, write a CSV or Parquet file and return its number of rows.

    Args:
        model: hub id, folder, s3:// URL or "tiny".
        file: past values, long or wide.
        horizon: steps to forecast.
        out: ``.csv`` or ``.parquet``; there whole or not at all.
        future: future values of known covariates, long, with the same item ids.
        target: column to forecast, or several.
        freq: pandas alias of one step; inferred when None.
        levels: quantile levels.
        batch_size: rows forecast at once.

    Raises:
        InputError: a file cannot be read or written, or what is in it breaks a rule of ``frames_to_forecast``.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"forecasts are written to a .csv or .parquet file, got {out}")
    if horizon < 1:
        raise InputError(f"horizon must be at least 1 step, got {horizon}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1 row, got {batch_size}")
    check_file_out(out, inputs=[file] if future is None else [file, future])
    past = read_frame(file, **({} if target is None else {"target": target}), freq=freq)
    ahead = None if future is None else read_frame(future)
    pipeline = ChronoMoEPipeline.from_pretrained(model)
    forecasts = pipeline.predict_df(
        past,
        future_df=ahead,
        target=list(target) if target else [TARGET],
        prediction_length=horizon,
        quantile_levels=list(levels),
        batch_size=batch_size,
        freq=freq,
        strict=True,
    )
    with whole_file(out) as scratch:
        if out.suffix == ".csv":
            forecasts.to_csv(scratch, index=False)
        else:
            forecasts.to_parquet(scratch, index=False)
    return len(forecasts)
