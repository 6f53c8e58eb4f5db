"""Requests and answers as Arrow streams: a row for each series, columns named as the fields of the JSON protocol."""

import json
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from chronomoe.errors import InputError
from chronomoe.serving.answers import forecast_start
from chronomoe.serving.asked import UNIVARIATE, Asked, Question, target_of
from chronomoe.serving.models import Answer
from chronomoe.serving.schema import ForecastOptions, Frequency, refusal

COLUMNS = {"name": "string", "series": "list of float64 or of lists of float64", "frequency": "string"}
METADATA = "its schema's metadata must hold 'model' and 'options', as JSON text such as {\"horizon\": 24}"


def read(body: bytes, *, most: int) -> Question:
    """Read a request of at most ``most`` series: columns ``name``, ``series``, ``frequency``, ``start_timestamp``.

    Raises:
        InputError: it is no such stream, or a compressed one, whose size nobody can know before it is in memory.
    """
    try:
        if any(_compressed(header) for header in _headers(body)):
            raise InputError("an Arrow stream must not be compressed here, got compressed buffers; write it without")
        with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
            _check(stream.schema)
            metadata = stream.schema.metadata or {}
            batches = []
            for batch in stream:
                batch.validate(full=True)  # offsets of a stranger may point anywhere
                batches.append(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error, IndexError) as error:
        said = " ".join(str(error).split())[:200] or "it does not begin as one"
        raise InputError(f"the body is no valid Arrow stream: {said}") from None
    if not {b"model", b"options"} <= metadata.keys():
        raise InputError(f"an Arrow stream names what it asks: {METADATA}; got {sorted(map(repr, metadata))}")
    try:
        options = ForecastOptions.model_validate_json(metadata[b"options"])
    except ValidationError as error:
        raise refusal(error) from None
    rows = sum(len(batch) for batch in batches)
    if not 1 <= rows <= most:
        raise InputError(f"an Arrow stream may have from 1 to {most} rows here, one for each series, got {rows}")
    return Question(
        model=metadata[b"model"].decode(errors="replace"),
        horizon=options.horizon,
        levels=tuple(options.quantiles or ()),
        explain=options.explain,
        series=[one for batch in batches for one in _series(batch)],
    )


def write(question: Question, answers: Sequence[Answer]) -> bytes:
    """Return a stream: ``name``, ``frequency``, ``start_timestamp``, ``mean_forecast``, a column for each level.

    Values are lists; lists of ``(time, variate)`` where a series of the request is multivariate.
    """
    flat = all(one.type == UNIVARIATE for one in question.series)
    kind = pa.list_(pa.float64()) if flat else pa.list_(pa.list_(pa.float64()))

    def column(values: Sequence[np.ndarray]) -> pa.Array:
        if not flat:
            return pa.array([each.T.tolist() for each in values], type=kind)
        offsets = np.cumsum([0, *(each.shape[1] for each in values)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate([each[0] for each in values]))

    columns = {
        "name": pa.array([one.name for one in question.series], pa.string()),
        "frequency": pa.array([str(one.frequency) for one in question.series], pa.string()),
        "start_timestamp": pa.array([forecast_start(one) for one in question.series], pa.string()),
        "mean_forecast": column([answer.median for answer in answers]),
    }
    columns |= {
        str(level): column([answer.quantiles[place] for answer in answers])
        for place, level in enumerate(question.levels)
    }
    if question.explain:
        columns["experts"] = pa.array([json.dumps(answer.experts) for answer in answers], pa.string())
    table = pa.table(columns, metadata={"model": question.model})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _check(schema: pa.Schema) -> None:
    wanted: dict[str, tuple[pa.DataType, ...]] = {
        **dict.fromkeys(("name", "frequency", "start_timestamp"), (pa.string(),)),
        "series": (pa.list_(pa.float64()), pa.list_(pa.list_(pa.float64()))),
    }
    for field in schema:
        if field.name not in wanted or not any(field.type.equals(kind) for kind in wanted[field.name]):
            raise InputError(
                f"columns of an Arrow stream are {COLUMNS}, and start_timestamp (string); got {field.name!r} "
                f"of type {field.type}"
            )
    if lacking := [name for name in COLUMNS if schema.names.count(name) != 1]:
        raise InputError(f"an Arrow stream needs one column {lacking[0]!r}; got the columns {schema.names}")


def _series(batch: pa.RecordBatch) -> Iterator[Asked]:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    starts = columns["start_timestamp"].to_pylist() if "start_timestamp" in columns else [None] * len(batch)
    rows = zip(columns["name"].to_pylist(), columns["frequency"].to_pylist(), starts, strict=True)
    known = {str(each) for each in Frequency}
    for place, (name, frequency, start) in enumerate(rows):
        values = columns["series"][place]
        if name is None or not values.is_valid:
            raise InputError(f"every row of an Arrow stream needs a name and a series, got none in row {place}")
        if frequency not in known:
            raise InputError(f"frequency of series {name!r} must be one of {', '.join(known)}, got {frequency!r}")
        if pa.types.is_floating(columns["series"].type.value_type):
            target = values.values.to_numpy(zero_copy_only=False)
            target = target_of(f"series {name!r}", target, multivariate=False)
        else:
            target = target_of(f"series {name!r}", values.as_py(), multivariate=True)
        yield Asked(name=name, frequency=frequency, start=start, target=target)


CONTINUES = 0xFFFFFFFF
RECORD_BATCH, DICTIONARY_BATCH = 3, 2
"""Types of messages that have a body: https://github.com/apache/arrow/blob/main/format/Message.fbs."""


def _headers(body: bytes) -> Iterator[bytes]:
    """Yield the flatbuffer of each message of a stream, whose lengths come first."""
    place = 0
    while place < len(body):
        mark, size = struct.unpack_from("<II", body, place)
        if mark != CONTINUES:  # of another format, or older than version 0.15 of this one
            raise struct.error
        if size == 0:  # end of stream
            return
        header = body[place + 8 : place + 8 + size]
        yield header
        length = _field(header, _root(header), 3)
        place += 8 + size + (0 if length is None else int(struct.unpack_from("<Q", header, length)[0]))


def _compressed(header: bytes) -> bool:
    """Whether the message of a header has compressed buffers."""
    message = _root(header)
    kind = _field(header, message, 1)
    if kind is None or header[kind] not in (RECORD_BATCH, DICTIONARY_BATCH):
        return False
    table = _follow(header, _field(header, message, 2))
    if header[kind] == DICTIONARY_BATCH:
        table = _follow(header, _field(header, table, 1))
    return _field(header, table, 3) is not None


def _root(header: bytes) -> int:
    return _follow(header, 0)


def _follow(header: bytes, place: int | None) -> int:
    if place is None:
        raise IndexError
    return place + int(struct.unpack_from("<I", header, place)[0])


def _field(header: bytes, table: int, number: int) -> int | None:
    """Return where a field of a flatbuffer's table stands, None where it was left out."""
    slots = table - int(struct.unpack_from("<i", header, table)[0])
    slot = 4 + 2 * number
    if slots < 0 or slot + 2 > struct.unpack_from("<H", header, slots)[0]:
        return None
    place = int(struct.unpack_from("<H", header, slots + slot)[0])
    return table + place if place else None
