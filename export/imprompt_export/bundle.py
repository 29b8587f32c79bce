"""The bundle file: one checkpoint set under one name, as TOML; parsed strictly, checked before any export."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from imprompt_export import kinds, sources
from imprompt_export.backends import export_backend
from imprompt_export.errors import BundleError, did_you_mean, one_of, some_of
from imprompt_export.families import all_families
from imprompt_serving.backends import MODULES, get_backend
from imprompt_serving.specs import Limits, Shapes

NO_FACES = "face_encoder: the bundle has no FaceID adapter that it could serve"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED = {"down", "mid", "up", "stream", "denoiser"}
_LARGEST = 2**31 - 1
"""Of numbers: requests and engines have 32 bits for them."""
_LEAST = {"waiting_rows": 0, "waiting_seconds": 0, "image_aspect_ratio": 1}
"""Of `[limits]`; of the others 1, or above 0 where they are not whole."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class IPAdapterSection(_Section, frozen=True):
    """An IP-Adapter, with the parameters of diffusers' `load_ip_adapter`; `path` may be the file itself."""

    name: str
    path: str
    weight_name: str | None = None
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
    """A LoRA, with the parameters of diffusers' ``load_lora_weights``: fused into the base, or chosen per request."""

    path: str
    weight_name: str | None = None
    subfolder: str | None = None
    scale: float | None = None
    fused: bool = True
    name: str | None = None
    """What requests call one that is not fused."""


class EngineSection(_Section, frozen=True):
    """The backend of the engines, and who hosts the encoders and the VAE.

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
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError among them
            raise BundleError(f"{path} is not TOML: {error}") from None
        _check_keys(content, cls, str(path))
        try:
            bundle = msgspec.convert({**content, "folder": str(path.resolve().parent)}, cls, dec_hook=_decode_path)
        except msgspec.ValidationError as error:
            raise BundleError(f"{path}: {_place_first(str(error))}") from None
        try:
            bundle._check()
        except OSError as error:
            raise BundleError(f"{path}: cannot read {error.filename}: {error.strerror}") from None
        return bundle

    def _check(self) -> None:
        self._check_names()
        for key, number in _numbers(self):
            if not -_LARGEST <= number <= _LARGEST:  # NaN too
                raise BundleError(f"{key}: must be a number of at most {_LARGEST}, got {number}")
        self._check_shapes(self.shapes)
        self._check_limits(self.limits)
        self._check_engine(self.engine)
        self.locate(self.base, "base")
        self._check_unfused()
        for lora in self.lora:
            sources.tensors(f"lora {lora.path}", self.lora_file(lora))
        for adapter in self.ip_adapter:
            self.adapter_file(adapter)
            self.image_encoder(adapter)
        for what, path, wanted in self.networks():
            kinds.model_config(what, self.locate(path, what), "", wanted)
        if self.face_encoder is not None:
            self._check_face_encoder(self.face_encoder)

    def _check_names(self) -> None:
        for what, sections in self._named().items():
            names = [section.name for section in sections]
            for name in names:
                if not _NAME.fullmatch(name) or name in _RESERVED:
                    raise BundleError(
                        f"{what}: {name!r} must match [a-z][a-z0-9_]*, have at most 64 characters, and be none of "
                        f"{', '.join(sorted(_RESERVED))}"
                    )
            if len(set(names)) < len(names):
                raise BundleError(f"{what}: names must differ, got {some_of(names)}")
        twice = [engine for engine, count in Counter(self.denoiser_engines()).items() if count > 1]
        if twice:
            raise BundleError(f"controlnet.name: two networks would be called {twice[0]}; rename one of them")

    def _check_shapes(self, shapes: Shapes) -> None:
        for axis in ("height", "width", "rows", "frames"):
            low, opt, high = getattr(shapes, axis)
            if not 1 <= low <= opt <= high:
                raise BundleError(f"shapes.{axis}: must be [min, opt, max] in ascending order, got {[low, opt, high]}")
            if axis in ("height", "width") and (low % 8 or opt % 8 or high % 8):
                raise BundleError(f"shapes.{axis}: sizes must be multiples of 8, got {[low, opt, high]}")
        tokens = shapes.image_tokens
        if not tokens or tokens[0] < 1 or list(tokens) != sorted(set(tokens)):
            raise BundleError(f"shapes.image_tokens: must be ascending padding buckets, got {list(tokens)}")
        if shapes.regions < 1:
            raise BundleError(f"shapes.regions: must be at least 1, got {shapes.regions}")

    def _check_limits(self, limits: Limits) -> None:
        for key, number in msgspec.structs.asdict(limits).items():
            least = _LEAST.get(key, 1 if isinstance(number, int) else None)
            if least is None and number <= 0:
                raise BundleError(f"limits.{key}: must be above 0, got {number}")
            if least is not None and number < least:
                raise BundleError(f"limits.{key}: must be at least {least}, got {number}")

    def _check_engine(self, engine: EngineSection) -> None:
        export_backend(one_of("engine.backend", engine.backend, MODULES)).check(engine)
        if engine.threads < 0:
            raise BundleError(f"engine.threads: 0 (one a core) or more, got {engine.threads}")
        if min(engine.devices, default=0) < 0 or len(set(engine.devices)) < len(engine.devices):
            raise BundleError(f"engine.devices: numbers of GPUs, each once, got {list(engine.devices)}")
        for target in engine.targets:
            if not re.fullmatch(r"SM\d{2,3}", target):
                raise BundleError(f"engine.targets: compute capabilities such as SM89, got {target!r}")

    def _check_unfused(self) -> None:
        engine = self.engine
        for lora in self.unfused:
            if lora.name is None:
                raise BundleError(
                    f"lora.name: lora {lora.path} is not fused and needs a name, which requests choose it by"
                )
            if lora.scale is not None:
                raise BundleError(f"lora.scale: lora {lora.name} is not fused; requests choose its scale")
        if self.unfused and not get_backend(engine.backend).swaps_weights:
            raise BundleError(
                f'lora.fused: engine.backend = "{engine.backend}" cannot change weights between requests; '
                'fuse the LoRA, or use backend = "inductor"'
            )

    def _check_face_encoder(self, section: FaceEncoderSection) -> None:
        folder = self.folder / section.path
        if not any(folder.glob("*.onnx")):
            raise BundleError(f"face_encoder.path: no .onnx files in {folder}; it wants those of buffalo_l, say")
        if any(size < 32 or size % 32 for size in section.det_size):
            raise BundleError(f"face_encoder.det_size: multiples of 32, got {list(section.det_size)}")
        if not 0 < section.det_thresh < 1:
            raise BundleError(f"face_encoder.det_thresh: above 0 and below 1, got {section.det_thresh:g}")
        if not self.ip_adapter:
            raise BundleError(NO_FACES)
        if find_spec("insightface") is None:
            raise BundleError('face_encoder: insightface is not installed: pip install "imprompt[export,face]"')

    def _named(self) -> dict[str, Sequence[Any]]:
        return {
            "name": (self,),
            "ip_adapter.name": self.ip_adapter,
            "controlnet.name, t2i_adapter.name": (*self.controlnet, *self.t2i_adapter),
            "lora.name": [lora for lora in self.lora if lora.name is not None],
        }

    @property
    def unfused(self) -> tuple[LoraSection, ...]:
        """The LoRAs that requests choose."""
        return tuple(lora for lora in self.lora if not lora.fused)

    def denoiser_engines(self) -> list[str]:
        """Names of the engines in the folder of the denoiser."""
        names = ["unet", "motion_unet"]
        names += [f"image_projection_{adapter.name}" for adapter in self.ip_adapter]
        names += [f"{part}_{net.name}" for net in self.controlnet for part in ("controlnet", "controlnet_embedding")]
        return names + [f"t2i_adapter_{adapter.name}" for adapter in self.t2i_adapter]

    def models(self) -> list[str]:
        """Names of all the Triton models that this bundle may have; some depend on its checkpoints."""
        parts = ["stream", "denoiser", *(f"denoiser_{gpu}" for gpu in self.engine.devices)]
        parts += sorted({encoder for family in all_families() for encoder, _ in family.text_encoders})
        parts += ["vae_encoder", "vae_decoder", "safety_checker", "face_encoder"]
        parts += [f"image_encoder_{adapter.name}" for adapter in self.ip_adapter]
        return [self.name, *(f"{self.name}_{part}" for part in parts)]

    def networks(self) -> Iterator[tuple[str, str, str]]:
        """What messages call each network beside the base, its path, and what it must be."""
        for net in self.controlnet:
            yield f"controlnet {net.name}", net.path, "a ControlNet"
        for t2i in self.t2i_adapter:
            yield f"t2i_adapter {t2i.name}", t2i.path, "a T2I-Adapter"
        if self.motion_adapter is not None:
            yield "motion_adapter", self.motion_adapter.path, "a motion adapter"

    def locate(self, path: str, what: str = "path") -> str:
        """A path relative to the bundle file as absolute, or a hub id (`sources.locate`)."""
        return sources.locate(what, self.folder, path)

    def lora_file(self, lora: LoraSection) -> Path:
        """The weight file of a LoRA."""
        what = f"lora {lora.path}"
        return sources.weights_file(what, self.locate(lora.path, what), lora.subfolder or "", lora.weight_name)

    def adapter_file(self, adapter: IPAdapterSection) -> Path:
        """The weight file of an adapter."""
        what = f"ip_adapter {adapter.name}"
        return sources.weights_file(what, self.locate(adapter.path, what), adapter.subfolder, adapter.weight_name)

    def image_encoder(self, adapter: IPAdapterSection) -> tuple[str, str] | None:
        """Root and subfolder of an adapter's image encoder, found as diffusers does; None for those that need none."""
        folder, what = adapter.image_encoder_folder, f"ip_adapter {adapter.name}"
        if folder is False:
            return None
        root = self.locate(adapter.path, what)
        if sources.is_local(root) and Path(root).is_file():
            root = str(Path(root).parent)
        subfolder = folder if "/" in folder else (Path(adapter.subfolder) / folder).as_posix()
        if sources.is_local(root) and not Path(root, subfolder, "config.json").is_file():
            raise BundleError(
                f"{what}: no image encoder at {Path(root, subfolder)}; "
                "set image_encoder_folder (false for FaceID adapters)"
            )
        kinds.model_config(what, root, subfolder, "a CLIP image encoder")
        return root, subfolder


def _numbers(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in `section`, by its key."""
    for name in section.__struct_fields__:
        values = getattr(section, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, msgspec.Struct):
                yield from _numbers(value, f"{prefix}{name}.")
            elif isinstance(value, int | float):
                yield f"{prefix}{name}", value


def _check_keys(content: Mapping[str, Any], section: type[msgspec.Struct], place: str) -> None:
    """Refuse a key that `section` does not have, with the one that may have been meant."""
    fields = {name: kind for name, kind in _sections(section).items() if name != "folder"}
    for key, value in content.items():
        if key not in fields:
            raise BundleError(f"{place}: no such key: {key}{did_you_mean(key, fields) or _elsewhere(key, section)}")
        inner = fields[key]
        for index, table in enumerate(value if isinstance(value, list) else [value]):
            if inner is not None and isinstance(table, Mapping):
                number = f"[{index}]" if isinstance(value, list) else ""
                _check_keys(table, inner, f"{place}: {key}{number}")


def _sections(section: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """The keys of a section, and of those that are sections themselves, their type."""
    found = {}
    for field in msgspec.structs.fields(section):
        types = (field.type, *getattr(field.type, "__args__", ()))
        found[field.name] = next((t for t in types if isinstance(t, type) and issubclass(t, msgspec.Struct)), None)
    return found


def _elsewhere(key: str, section: type[msgspec.Struct]) -> str:
    """The end of a message about a key that another section has."""
    homes = {name: inner for name, inner in _sections(BundleFile).items() if inner is not None and inner is not section}
    home = next((name for name, inner in homes.items() if key in _sections(inner)), None)
    if section is not BundleFile and key in _sections(BundleFile) and key != "name":
        return "; it is a key of the file itself, not of a section"
    return f"; it is a key of {home}" if home else "; see docs/bundle.md for those there are"


def _place_first(message: str) -> str:
    """msgspec's messages with the key in front: `shapes.rows: Expected ...`."""
    text, found, place = message.partition(" - at `$.")
    place = place.rstrip("`")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`(?: - at `\$\.?(.*)`)?", message):
        key = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return f"{key}: this key is required"
    if not found:
        return message
    text = re.sub("`object( . null)?`", "a table ([...])", text).replace("`array`", "a list ([[...]] for tables)")
    return f"{place}: {text[:1].lower()}{text[1:]}"


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)
