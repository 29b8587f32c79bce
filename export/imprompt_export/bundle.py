"""The bundle file: one checkpoint set under one name, as TOML; parsed strictly, checked before any export."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from imprompt_serving.engines import BACKENDS
from imprompt_serving.specs import Limits, Shapes

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {"down", "mid", "up", "stream", "denoiser"}


class BundleError(ValueError):
    """A bundle file that cannot be exported; the message names the key or file and what would be right."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class IPAdapterSection(_Section, frozen=True):
    """An IP-Adapter, with the parameters of diffusers' ``load_ip_adapter``."""

    name: str
    path: str
    weight_name: str
    subfolder: str = ""
    image_encoder_folder: str | Literal[False] = "image_encoder"


class ControlNetSection(_Section, frozen=True):
    """A ControlNet: what requests call it, and its diffusers folder."""

    name: str
    path: str


class T2IAdapterSection(_Section, frozen=True):
    """A T2I-Adapter: what requests call it, and its diffusers folder."""

    name: str
    path: str


class MotionAdapterSection(_Section, frozen=True):
    """An AnimateDiff motion adapter: its diffusers folder."""

    path: str


class FaceEncoderSection(_Section, frozen=True):
    """A folder of insightface's models, by which FaceID adapters take pictures of people; and how they search."""

    path: str
    det_size: tuple[int, int] = (640, 640)
    det_thresh: float = 0.5


class LoraSection(_Section, frozen=True):
    """A LoRA that is fused into the base, with the parameters of diffusers' ``load_lora_weights``."""

    path: str
    weight_name: str | None = None
    subfolder: str | None = None
    scale: float = 1.0


class EngineSection(_Section, frozen=True):
    """What the engines are compiled to, and who hosts the encoders and the VAE.

    ``threads`` of one call on the CPU, 0 for one a core. ``devices``: GPUs that have a denoiser each.
    ``min_snr_db``: how good int8 must be (``int8.Quality``).
    ``targets``: compute capabilities that engines of TensorRT-RTX are made for. ``refit``: whether the weights of
    TensorRT's engines can be replaced later.
    """

    backend: str = "onnxruntime"
    precision: str = "fp32"
    host: str = "python"
    threads: int = 0
    devices: tuple[int, ...] = ()
    min_snr_db: float = 10.0
    targets: tuple[str, ...] = ("SM80", "SM86", "SM89", "SM120")
    refit: bool = False


class BundleFile(_Section, frozen=True):
    """A parsed bundle file; relative paths in it are relative to ``folder``."""

    name: str
    base: str
    ip_adapter: tuple[IPAdapterSection, ...] = ()
    controlnet: tuple[ControlNetSection, ...] = ()
    t2i_adapter: tuple[T2IAdapterSection, ...] = ()
    motion_adapter: MotionAdapterSection | None = None
    lora: tuple[LoraSection, ...] = ()
    face_encoder: FaceEncoderSection | None = None
    engine: EngineSection = EngineSection()
    shapes: Shapes = Shapes()
    limits: Limits = Limits()
    folder: Path = Path()

    @classmethod
    def load(cls, path: str | Path) -> BundleFile:
        """Read and check ``path``.

        Raises:
            BundleError: unknown key, wrong type, bad name, impossible range or missing file, by name.
        """
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"cannot read bundle file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} is not TOML: {error}") from None
        if "folder" in content:
            raise BundleError("Object contains unknown field `folder`")
        try:
            bundle = msgspec.convert({**content, "folder": str(path.resolve().parent)}, cls, dec_hook=_decode_path)
        except msgspec.ValidationError as error:
            raise BundleError(f"{path}: {error}") from None
        bundle._check()
        return bundle

    def _check(self) -> None:
        for what, sections in self._named().items():
            names = [section.name for section in sections]
            for name in names:
                if not _NAME.fullmatch(name) or name in _RESERVED:
                    raise BundleError(f"{what}: {name!r} must match [a-z][a-z0-9_]* and be none of {sorted(_RESERVED)}")
            if len(set(names)) < len(names):
                raise BundleError(f"{what}: names must differ, got {names}")
        for axis in ("height", "width", "rows", "frames"):
            low, opt, high = getattr(self.shapes, axis)
            if not 1 <= low <= opt <= high:
                raise BundleError(f"shapes.{axis}: must be [min, opt, max] in ascending order, got {[low, opt, high]}")
            if axis in ("height", "width") and (low % 8 or opt % 8 or high % 8):
                raise BundleError(f"shapes.{axis}: sizes must be multiples of 8, got {[low, opt, high]}")
        tokens = self.shapes.image_tokens
        if not tokens or tokens[0] < 1 or list(tokens) != sorted(set(tokens)):
            raise BundleError(f"shapes.image_tokens: must be ascending padding buckets, got {list(tokens)}")
        if self.shapes.regions < 1:
            raise BundleError(f"shapes.regions: must be at least 1, got {self.shapes.regions}")
        if self.limits.waiting_rows < 0 or not 0 <= self.limits.waiting_seconds < float("inf"):
            raise BundleError("limits: waiting_rows and waiting_seconds must not be negative")
        self._check_engine(self.engine)
        for lora in self.lora:
            root = Path(self.locate(lora.path))
            if root.is_dir() and lora.weight_name and not (root / (lora.subfolder or "") / lora.weight_name).is_file():
                raise BundleError(f"lora: no file {root / (lora.subfolder or '') / lora.weight_name}")
        for adapter in self.ip_adapter:
            self.adapter_file(adapter)
            self.image_encoder(adapter)
        for net in self.controlnet:
            self.check_model(f"controlnet {net.name}", net.path)
        for t2i in self.t2i_adapter:
            self.check_model(f"t2i_adapter {t2i.name}", t2i.path)
        if self.motion_adapter is not None:
            self.check_model("motion_adapter", self.motion_adapter.path)

        if self.face_encoder is not None:
            self._check_face_encoder(self.face_encoder)

    def _check_engine(self, engine: EngineSection) -> None:
        backend = BACKENDS[_one_of("engine.backend", engine.backend, BACKENDS)]
        _one_of(f"engine.precision (with {engine.backend})", engine.precision, backend.precisions)
        _one_of(f"engine.host (with {engine.backend})", engine.host, backend.hosts)
        if engine.threads < 0:
            raise BundleError(f"engine.threads: 0 (one a core) or more, got {engine.threads}")
        if min(engine.devices, default=0) < 0 or len(set(engine.devices)) < len(engine.devices):
            raise BundleError(f"engine.devices: numbers of GPUs, each once, got {list(engine.devices)}")
        packages = {"openvino": "openvino"} if engine.backend == "openvino" else {}
        packages |= {"nncf": "int8"} if engine.precision == "int8" else {}
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            extras = ",".join(packages[package] for package in missing)
            raise BundleError(f"engine: {', '.join(missing)} is not installed: install imprompt[export,{extras}]")
        if engine.refit and not backend.compiled:
            raise BundleError(f"engine.refit: is for TensorRT's engines; {engine.backend} has nothing to refit")
        for target in engine.targets:
            if not re.fullmatch(r"SM\d{2,3}", target):
                raise BundleError(f"engine.targets: compute capabilities such as SM89, got {target!r}")

    def _check_face_encoder(self, section: FaceEncoderSection) -> None:
        folder = self.folder / section.path
        if not any(folder.glob("*.onnx")):
            raise BundleError(f"face_encoder.path: no .onnx files in {folder}; it wants those of buffalo_l, say")
        if any(size < 32 or size % 32 for size in section.det_size):
            raise BundleError(f"face_encoder.det_size: multiples of 32, got {list(section.det_size)}")
        if not 0 < section.det_thresh < 1:
            raise BundleError(f"face_encoder.det_thresh: above 0 and below 1, got {section.det_thresh:g}")
        if not self.ip_adapter:
            raise BundleError("face_encoder: the bundle has no FaceID adapter that it could serve")

    def _named(self) -> dict[str, Sequence[Any]]:
        return {
            "name": (self,),
            "ip_adapter.name": self.ip_adapter,
            "controlnet.name, t2i_adapter.name": (*self.controlnet, *self.t2i_adapter),
        }

    def locate(self, path: str) -> str:
        """A path relative to the bundle file as absolute; anything that is not there is taken for a hub id."""
        local = self.folder / path
        if local.exists():
            return str(local.resolve())
        if local.is_absolute() or path.startswith(".") or path.count("/") != 1 or (local.parent.is_dir()):
            raise BundleError(f"{path}: no such file or folder in {self.folder}")
        return path

    def check_model(self, what: str, path: str) -> None:
        """Refuse a local folder that holds no diffusers model."""
        root = Path(self.locate(path))
        if root.exists() and not (root / "config.json").is_file():
            raise BundleError(f"{what}: no config.json in {root}")

    def adapter_file(self, adapter: IPAdapterSection) -> Path:
        """The weight file of an adapter."""
        root = self.locate(adapter.path)
        if Path(root).is_dir():
            file = Path(root, adapter.subfolder, adapter.weight_name)
        else:
            file = _download(root, "/".join(filter(None, (adapter.subfolder, adapter.weight_name))))
        if not file.is_file():
            raise BundleError(f"ip_adapter {adapter.name}: no file {file}")
        return file

    def image_encoder(self, adapter: IPAdapterSection) -> tuple[str, str] | None:
        """Root and subfolder of an adapter's image encoder, found as diffusers does; None for those that need none."""
        if adapter.image_encoder_folder is False:
            return None
        folder = adapter.image_encoder_folder
        subfolder = folder if "/" in folder else (Path(adapter.subfolder) / folder).as_posix()
        root = self.locate(adapter.path)
        if Path(root).is_dir() and not Path(root, subfolder, "config.json").is_file():
            raise BundleError(
                f"ip_adapter {adapter.name}: no image encoder at {Path(root, subfolder)}; "
                "set image_encoder_folder (false for FaceID adapters)"
            )
        return root, subfolder


def _one_of(key: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise BundleError(f"{key}: {value!r} is none of {', '.join(allowed)}")
    return value


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)


def _download(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))
