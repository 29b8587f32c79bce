"""Where the checkpoints of a bundle are: folders and files beside it, or repositories of the Hugging Face hub.

Reads configurations, and names and shapes of tensors, without torch, so that mistakes show before it is imported.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imprompt_export.errors import BundleError, did_you_mean, some_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files with weights, best first."""


class TensorInfo(NamedTuple):
    """A tensor that has not been read."""

    shape: tuple[int, ...]


def locate(what: str, folder: Path, path: str) -> str:
    """`path`, relative to `folder`, as an absolute path; what is not there and looks like `owner/name` is a hub id.

    Offline (`HF_HUB_OFFLINE`), a hub id becomes the folder that the hub's cache has of it.

    Raises:
        BundleError: it is neither, or not in the cache.
    """
    local = folder / path
    if local.exists():
        return str(local.resolve())
    # "checkpoints/sd15" beside a folder "checkpoints" is a misspelt path, not a repository of one "checkpoints".
    if not _HUB_ID.fullmatch(path) or local.parent.is_dir():
        raise BundleError(f"{what}: no such file or folder in {folder}: {path}{_nearest(local)}")
    from huggingface_hub import constants

    return _snapshot(what, path) if constants.HF_HUB_OFFLINE else path


def _nearest(missing: Path) -> str:
    if not missing.parent.is_dir():
        return ""
    return did_you_mean(missing.name, sorted(entry.name for entry in missing.parent.iterdir()))


def is_local(root: str) -> bool:
    """Whether `locate` found `root` on this machine."""
    return Path(root).is_absolute()


def find(what: str, root: str, file: str) -> Path:
    """`file` of `root`, from the hub or its cache where `root` is a hub id.

    Raises:
        BundleError: it is not there, or cannot be had; the message names `what` it is for.
    """
    if not is_local(root):
        return _download(what, root, file)
    path = Path(root, file)
    if not path.is_file():
        raise BundleError(f"{what}: no file {path}{_nearest(path)}")
    return path


def weights_file(what: str, root: str, subfolder: str, name: str | None) -> Path:
    """The file of weights called `name`, or the only one, in `subfolder` of `root`; `root` may be the file itself.

    Raises:
        BundleError: there is none, or there are several to choose from.
    """
    if is_local(root) and Path(root).is_file():
        if subfolder or name not in (None, Path(root).name):
            raise BundleError(f"{what}: {root} is a file already; leave out subfolder and weight_name")
        return Path(root)
    if name is not None:
        return find(what, root, "/".join(filter(None, (subfolder, name))))
    if is_local(root):
        if not Path(root, subfolder).is_dir():
            raise BundleError(f"{what}: no folder {Path(root, subfolder)}{_nearest(Path(root, subfolder))}")
        names = [entry.name for entry in sorted(Path(root, subfolder).iterdir()) if entry.is_file()]
    else:
        names = _hub_files(what, root, subfolder)
    for suffix in WEIGHTS:
        found = [candidate for candidate in names if candidate.endswith(suffix)]
        if len(found) > 1:
            raise BundleError(f"{what}: {root} holds {some_of(found)}; say which one by weight_name")
        if found:
            return find(what, root, "/".join(filter(None, (subfolder, found[0]))))
    raise BundleError(f"{what}: no file with weights ({', '.join(WEIGHTS)}) in {Path(root, subfolder)}")


def read_json(what: str, root: str, file: str) -> dict[str, Any]:
    """The JSON object in `file` of `root`."""
    path = find(what, root, file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{what}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{what}: {path} holds no JSON object")
    return content


def tensors(what: str, file: Path) -> dict[str, Any] | None:
    """Names of the tensors in `file`, with a `TensorInfo` each, nested as they are in `.bin` files.

    None for formats that only torch can read.

    Raises:
        BundleError: the file is damaged, or would run code.
    """
    if file.suffix == ".safetensors":
        return _safetensors(what, file)
    if file.suffix not in WEIGHTS:
        raise BundleError(f"{what}: {file} is no file with weights ({', '.join(WEIGHTS)})")
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            if opened.read(1) == b"\x80":  # a pickle, as torch wrote them before 1.6
                return None
        raise BundleError(f"{what}: {file} is damaged: not what torch.save writes, or cut off")
    return _pickled(what, file)


def _safetensors(what: str, file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {key: TensorInfo(tuple(opened.get_slice(key).get_shape())) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{what}: {file} is damaged or no safetensors file: {error}") from None


def _pickled(what: str, file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if not names:
                raise BundleError(f"{what}: {file} is not what torch.save writes")
            with archive.open(names[0]) as opened:
                content = _ShapeReader(opened).load()
    except BundleError:
        raise
    except pickle.UnpicklingError as error:
        raise BundleError(f"{what}: {file} is not a file of plain tensors: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise BundleError(f"{what}: {file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{what}: {file} is not a file of plain tensors: it holds a {type(content).__name__}")
    return content


class _ShapeReader(pickle.Unpickler):
    """Reads what `torch.save` wrote without its data, and without running code that is in it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *_: TensorInfo(tuple(size))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage"):
            return f"{module}.{name}"  # types of storages, which are not called
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def _snapshot(what: str, repository: str) -> str:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return str(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError, errors.EntryNotFoundError):
        cache = constants.HF_HUB_CACHE
        raise BundleError(
            f"{_not_beside(what, repository)} the hub's {repository} is not in {cache} (HF_HUB_OFFLINE is set)"
        ) from None


def _download(what: str, repository: str, file: str) -> Path:
    from huggingface_hub import (
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    try:
        if not isinstance(try_to_load_from_cache(repository, file), str):
            get_hf_file_metadata(hf_hub_url(repository, file))  # the download would retry for half a minute
        return Path(hf_hub_download(repository, file))
    except errors.GatedRepoError:
        raise BundleError(
            f"{what}: accept the terms of https://huggingface.co/{repository}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BundleError(
            f"{_not_beside(what, repository)} the hub has no such repository, or it is private (`hf auth login`)"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise BundleError(f"{what}: no file {file} in {repository} on the hub") from None
    except Exception as error:  # the many errors of HTTP and of validation
        raise BundleError(
            f"{_not_beside(what, repository)} {file} of the hub's {repository} cannot be had: {error}"
        ) from None


def _hub_files(what: str, repository: str, subfolder: str) -> list[str]:
    """Names of the files in `subfolder`; of those in the cache where the hub cannot be reached."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        paths = [Path(file.rfilename) for file in HfApi().model_info(repository).siblings or ()]
    except Exception as error:
        try:
            snapshot = Path(snapshot_download(repository, local_files_only=True))
        except (OSError, ValueError, errors.EntryNotFoundError):
            raise BundleError(f"{_not_beside(what, repository)} the hub's cannot be listed: {error}") from None
        paths = [path.relative_to(snapshot) for path in sorted(snapshot.rglob("*"))]
    return [path.name for path in paths if path.parent == Path(subfolder)]


def _not_beside(what: str, repository: str) -> str:
    return f"{what}: there is no folder {repository} beside the bundle file, and"


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tensors by their joined names; what is not a tensor is left out."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif hasattr(value, "shape"):
            found[f"{prefix}{key}"] = value
    return found
