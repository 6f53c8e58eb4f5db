"""Finding a checkpoint by name, and reading what it holds."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import chronos.chronos2
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from chronomoe.errors import InputError, extra, nearest

ACCEPTED = "a hub id (owner/name), a folder, an s3:// URL or 'tiny'"
SHIPPED = ("tiny",)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
ADAPTER = "adapter_config.json"
WEIGHTS = "*.safetensors"
GRAPH = "model.onnx"
"""What a folder holds instead that was exported."""


def find_checkpoint(name: str | Path, *, subfolder: str = "", force_s3_download: bool = False) -> str:
    """Return what ``transformers`` can load for ``name``: a folder on this machine, or a hub id as it is.

    Raises:
        InputError: there is no such folder, or it holds no checkpoint.
    """
    if str(name).startswith("s3://"):
        folder = _download_from_s3(str(name), force=force_s3_download)
    elif name in SHIPPED:
        folder = Path(str(files("chronomoe"))) / "assets" / str(name)
        if not (folder / "config.json").is_file():
            raise InputError(f"this installation holds no checkpoint {name!r}; reinstall chronomoe, or pass {ACCEPTED}")
    else:
        folder = Path(name).expanduser()
        if not folder.exists() and not _names_a_folder(name):
            if "/" not in str(name):
                hint = nearest(str(name), SHIPPED)
                raise InputError(f"no checkpoint {str(name)!r}: a hub id has an owner; accepted are {ACCEPTED}.{hint}")
            return str(name)
    _check_folder(folder / subfolder, name=str(name))
    return str(folder)


def exported(name: str | Path, backend: str | None) -> bool:
    """Whether a checkpoint is to be loaded as an exported graph: if asked for, or if its folder holds one.

    Raises:
        InputError: there is no such backend.
    """
    if backend not in (None, "torch", "onnx", "openvino"):
        raise InputError(f"backend must be 'torch', 'onnx' or 'openvino', got {backend!r}")
    return backend in ("onnx", "openvino") or (backend is None and (Path(name).expanduser() / GRAPH).is_file())


def _names_a_folder(name: str | Path) -> bool:
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text
    return is_path or text.count("/") > 1 or ("/" in text and Path(text).parent.is_dir())


def _check_folder(folder: Path, *, name: str) -> None:
    if not folder.exists():
        raise InputError(f"no checkpoint at {name!r}: there is no folder {folder}; accepted are {ACCEPTED}")
    if not folder.is_dir():
        raise InputError(f"a checkpoint is a folder, {name!r} is a file; pass the folder that holds config.json")
    if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise InputError(f"no checkpoint in {name!r}: the folder has no config.json")
    for path in folder.iterdir():
        if not _stays_inside(path, folder.resolve()):
            raise InputError(
                f"the checkpoint {name!r} is refused: its {path.name} is a link to {path.resolve()}; copy it"
            )
    if next(folder.glob(WEIGHTS), None) is None:
        raise InputError(
            f"the checkpoint {name!r} has no weights: the folder has no model.safetensors, which is the only form "
            "loaded; save the model again, or download all of it"
        )


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in its folder, or in ``blobs``, where the hub's cache keeps what its snapshots link to."""
    target = path.resolve()
    blobs = folder.parent.parent / "blobs"
    return target.is_relative_to(folder) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))


def _download_from_s3(url: str, *, force: bool) -> Path:
    if len(url.removeprefix("s3://").strip("/").split("/")) < 2:
        raise InputError(f"an S3 checkpoint is s3://bucket/folder, got {url!r}")
    with extra("s3"):
        from botocore.exceptions import BotoCoreError, ClientError
        from chronos.boto_utils import cache_model_from_s3
    try:
        return Path(cache_model_from_s3(url, force_download=force))
    except (BotoCoreError, ClientError) as error:
        raise InputError(f"{url!r} cannot be read from S3: {error}") from error


def read_config(name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``.

    Args:
        name: a hub id or a folder.
        options: of ``from_pretrained``; those of the hub are used.

    Raises:
        OSError: there is none, or the hub cannot be reached.
        InputError: it is not a JSON object.
    """
    file = cached_file(name, "config.json", **{key: options[key] for key in HUB_OPTIONS if key in options})
    try:
        values = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"cannot load {str(name)!r}: its config.json is not a valid JSON file: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"cannot load {str(name)!r}: its config.json holds a {type(values).__name__}, not an object")
    return values


def architecture(name: str, values: Mapping[str, Any]) -> type[PreTrainedModel]:
    """Return the model class that the ``config.json`` of a checkpoint names.

    Raises:
        InputError: it names none, or one that is neither Chronos-2 nor ours.
    """
    known = {
        key: value
        for key, value in vars(chronos.chronos2).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel)
    }
    wanted = _first_architecture(values)
    if wanted is None:
        raise InputError(
            f"{name!r} is not a Chronos-2 checkpoint: its config.json names no architecture "
            f"(model_type {values.get('model_type')!r}); accepted are {', '.join(known)}"
        )
    if wanted not in known:
        raise InputError(
            f"{name!r} is not a Chronos-2 checkpoint: unknown architecture {wanted!r}. "
            f"Available: {', '.join(known)}.{nearest(wanted, known)}"
        )
    if "chronos_config" not in values:
        raise InputError(f"{name!r} is not a Chronos-2 checkpoint: its config.json has no chronos_config")
    return known[wanted]


def named_architecture(name: Any, options: Mapping[str, Any]) -> str | None:
    """Return the architecture that a checkpoint names; None if there is none, or reading it takes a download.

    Args:
        name: a hub id, a folder or an ``s3://`` URL.
        options: of ``from_pretrained``; those of the hub are used.
    """
    if str(name).startswith("s3://"):
        return None
    try:
        return _first_architecture(read_config(name, options))
    except (OSError, InputError):
        return None


def _first_architecture(values: Mapping[str, Any]) -> str | None:
    names = values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None
