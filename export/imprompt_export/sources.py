"""Find the checkpoints of a bundle: local folders and files, or repositories of the Hugging Face hub.

Configurations and the names and shapes of tensors are read without torch, so that mistakes show before it is imported.
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
"""Suffixes of weight files, in order of preference."""


class TensorInfo(NamedTuple):
    """The shape of a tensor whose data has not been read."""

    shape: tuple[int, ...]


class Source(NamedTuple):
    """Where a network is loaded from: a folder of diffusers, or a single file and the folder of its configuration."""

    config: str | None
    """Folder or hub id with the configuration, and with the weights if there is no `file`; None: not given."""
    subfolder: str = ""
    """Folder within `config`."""
    file: Path | None = None
    variant: str | None = None
    """Files to choose in a folder that has several, such as `fp16`."""


def locate(what: str, folder: Path, path: str) -> str:
    """Return `path`, relative to `folder`, as an absolute path, or unchanged if it is a hub id.

    A path that does not exist and looks like `owner/name` is a hub id. Offline (`HF_HUB_OFFLINE`), return the folder in
    the hub's cache instead.

    Args:
        what: the checkpoint's name in messages.
        folder: the folder of the bundle file.
        path: a path or a hub id.

    Raises:
        BundleError: the path does not exist, or the hub id is not in the cache while offline.
    """
    local = folder / path
    if local.exists():
        return str(local.resolve())
    # If there is a folder "checkpoints", then "checkpoints/sd15" is a misspelled path, not a repository on the hub.
    if not _HUB_ID.fullmatch(path) or local.parent.is_dir():
        raise BundleError(f"{what}: no such file or folder in {folder}: {path}{_nearest(local)}")
    from huggingface_hub import constants

    return _snapshot(what, path) if constants.HF_HUB_OFFLINE else path


def _nearest(missing: Path) -> str:
    if not missing.parent.is_dir():
        return ""
    return did_you_mean(missing.name, sorted(entry.name for entry in missing.parent.iterdir()))


def is_local(root: str) -> bool:
    """Return whether `locate` found `root` on this machine."""
    return Path(root).is_absolute()


def find(what: str, root: str, file: str) -> Path:
    """Return the path of `file` in `root`; if `root` is a hub id, download the file or take it from the hub's cache.

    Raises:
        BundleError: the file does not exist or cannot be downloaded; the message starts with `what`.
    """
    if not is_local(root):
        return _download(what, root, file)
    path = Path(root, file)
    if not path.is_file():
        raise BundleError(f"{what}: no file {path}{_nearest(path)}")
    return path


def weights_file(what: str, root: str, subfolder: str, name: str | None) -> Path:
    """Return the weight file `name` in `subfolder` of `root`, or the only one there; `root` may be the file itself.

    Raises:
        BundleError: there is no such file, or several files and no `name`.
    """
    if is_local(root) and Path(root).is_file():
        if subfolder or name not in (None, Path(root).name):
            raise BundleError(f"{what}: {root} is already a file; leave out subfolder and weight_name")
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
            raise BundleError(f"{what}: {root} has several weight files ({some_of(found)}); choose one in weight_name")
        if found:
            return find(what, root, "/".join(filter(None, (subfolder, found[0]))))
    raise BundleError(f"{what}: no weight file ({', '.join(WEIGHTS)}) in {Path(root, subfolder)}")


def single_file(what: str, root: str, name: str | None) -> Path | None:
    """Return the file of a checkpoint in a single file; None if `root` is a folder or repository in diffusers' layout.

    Raises:
        BundleError: there is no file `name` in `root`.
    """
    if name is None and not (is_local(root) and Path(root).is_file()):
        return None
    return weights_file(what, root, "", name)


def read_json(what: str, root: str, file: str) -> dict[str, Any]:
    """Read the JSON object in `file` of `root`.

    Raises:
        BundleError: the file does not exist, or holds something else.
    """
    path = find(what, root, file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{what}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{what}: {path} is not a JSON object")
    return content


def tensors(what: str, file: Path) -> dict[str, Any] | None:
    """Read the names and shapes (`TensorInfo`) of the tensors in `file`, nested as they are in `.bin` files.

    None for formats that only torch can read.

    Raises:
        BundleError: the file is damaged, or would run code when loaded.
    """
    if file.suffix == ".safetensors":
        return _safetensors(what, file)
    if file.suffix not in WEIGHTS:
        raise BundleError(f"{what}: {file} is not a weight file ({', '.join(WEIGHTS)})")
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            if opened.read(1) == b"\x80":  # a plain pickle, the format of torch before 1.6
                return None
        raise BundleError(f"{what}: {file} is damaged: it was not written by torch.save, or it is cut off")
    return _pickled(what, file)


def flat_tensors(what: str, file: Path) -> dict[str, Any] | None:
    """Read the names and shapes of the tensors in `file`, without nesting and training state.

    None for formats that only torch can read.

    Raises:
        BundleError: the file is damaged, or would run code when loaded.
    """
    content = tensors(what, file)
    while content is not None and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return None if content is None else flat(content)


def _safetensors(what: str, file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {key: TensorInfo(tuple(opened.get_slice(key).get_shape())) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{what}: {file} is damaged or not a safetensors file: {error}") from None


def _pickled(what: str, file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if not names:
                raise BundleError(f"{what}: {file} was not written by torch.save")
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
    """Reads a file of `torch.save` without the tensors' data and without running any code in it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *_: TensorInfo(tuple(size))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage"):
            return f"{module}.{name}"  # storage types, which are never called
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def _snapshot(what: str, repository: str) -> str:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return str(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError, errors.EntryNotFoundError):
        cache = constants.HF_HUB_CACHE
        raise BundleError(
            f"{_no_folder(what, repository)} the hub repository {repository} is not in {cache} (HF_HUB_OFFLINE is set)"
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
            f"{what}: accept the terms at https://huggingface.co/{repository}, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BundleError(
            f"{_no_folder(what, repository)} the hub has no such repository, or it is private (run `hf auth login`)"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise BundleError(f"{what}: no file {file} in {repository} on the hub") from None
    except Exception as error:  # there are many types of HTTP and validation errors
        raise BundleError(
            f"{_no_folder(what, repository)} {file} of the hub repository {repository} cannot be downloaded: {error}"
        ) from None


def _hub_files(what: str, repository: str, subfolder: str) -> list[str]:
    """List the files in `subfolder` of a hub repository, or those in the cache if the hub cannot be reached."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        paths = [Path(file.rfilename) for file in HfApi().model_info(repository).siblings or ()]
    except Exception as error:
        try:
            snapshot = Path(snapshot_download(repository, local_files_only=True))
        except (OSError, ValueError, errors.EntryNotFoundError):
            raise BundleError(f"{_no_folder(what, repository)} the hub repository cannot be listed: {error}") from None
        paths = [path.relative_to(snapshot) for path in sorted(snapshot.rglob("*"))]
    return [path.name for path in paths if path.parent == Path(subfolder)]


def _no_folder(what: str, repository: str) -> str:
    return f"{what}: there is no folder {repository} next to the bundle file, and"


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tensors to joined names; values that are not tensors are left out."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif hasattr(value, "shape"):
            found[f"{prefix}{key}"] = value
    return found
