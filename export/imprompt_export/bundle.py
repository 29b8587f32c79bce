"""Parse and check the bundle file: a TOML file that describes one set of checkpoints under one name."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from imprompt_export import checkpoint_kinds, single_files, sources
from imprompt_export.backends import export_backend
from imprompt_export.errors import BundleError, did_you_mean, one_of, some_of
from imprompt_export.families import all_families
from imprompt_export.sections import (
    ControlNetSection,
    DefaultsSection,
    EngineSection,
    FaceEncoderSection,
    IPAdapterSection,
    LoraSection,
    MotionAdapterSection,
    NetworkSection,
    Section,
    T2IAdapterSection,
    TextualInversionSection,
)
from imprompt_export.sources import Source
from imprompt_serving.backends import MODULES, get_backend
from imprompt_serving.parameters import PARAMETERS
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Limits, Shapes

NO_FACES = "face_encoder: the bundle has no FaceID adapter to use it"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED = {"down", "mid", "up", "stream", "denoiser"}
_LARGEST = 2**31 - 1
"""Largest number in a bundle file: requests and engines store numbers in 32 bits."""
_LEAST = {"waiting_rows": 0, "waiting_seconds": 0, "image_aspect_ratio": 1}
"""Minimum of some keys of `[limits]`; other integers must be at least 1, other floats above 0."""


class Network(NamedTuple):
    """A network besides the base: its name in messages, where it is, and the kind that it must be."""

    what: str
    source: Source
    kind: str


class BundleFile(Section, frozen=True):
    """A parsed bundle file; its paths are relative to `folder`.

    `weight_name`, `config`, and `variant` belong to `base`, as in a `NetworkSection`. `unet` and `vae` replace those of
    the base.
    """

    name: str
    base: str
    weight_name: str | None = None
    config: str | None = None
    variant: str | None = None
    unet: NetworkSection | None = None
    vae: NetworkSection | None = None
    textual_inversion: tuple[TextualInversionSection, ...] = ()
    defaults: DefaultsSection = DefaultsSection()
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
        """Read and check the bundle file at `path`.

        Raises:
            BundleError: names the key that is unknown or has a bad value, or the file that is missing.
        """
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"cannot read bundle file {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError and TOMLDecodeError
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
        self._check_defaults(self.defaults)
        self.base_source()
        self._check_unfused_loras()
        for lora in self.lora:
            sources.tensors(f"lora {lora.path}", self.lora_file(lora))
        for adapter in self.ip_adapter:
            self.adapter_file(adapter)
            self.image_encoder(adapter)
        for embedding in self.textual_inversion:
            sources.flat_tensors(f"textual_inversion {embedding.path}", self.embedding_file(embedding))
        for what, source, expected in self.networks():
            if source.config is not None:
                checkpoint_kinds.model_config(what, source.config, source.subfolder, expected)
            if source.file is not None:
                single_files.check_kind(what, source.file, expected)
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
            raise BundleError(f"engine.threads: must be 0 (one per core) or more, got {engine.threads}")
        if min(engine.devices, default=0) < 0 or len(set(engine.devices)) < len(engine.devices):
            raise BundleError(f"engine.devices: must be distinct GPU numbers, got {list(engine.devices)}")
        for target in engine.targets:
            if not re.fullmatch(r"SM\d{2,3}", target):
                raise BundleError(f"engine.targets: must be compute capabilities such as SM89, got {target!r}")

    def _check_defaults(self, defaults: DefaultsSection) -> None:
        if defaults.scheduler is not None:
            hint = did_you_mean(defaults.scheduler, SCHEDULERS)
            if defaults.scheduler not in SCHEDULERS:
                raise BundleError(
                    f"defaults.scheduler: {defaults.scheduler!r} is not one of {', '.join(SCHEDULERS)}{hint}"
                )
        for name, value in defaults.values.items():
            row = PARAMETERS[name]
            if not row.low <= value <= row.high:
                raise BundleError(f"defaults.{name}: must be {row.low:g} to {row.high:g}, got {value}")

    def _check_unfused_loras(self) -> None:
        engine = self.engine
        for lora in self.unfused_loras:
            if lora.name is None:
                raise BundleError(
                    f"lora.name: lora {lora.path} is not fused and needs a name, which requests choose it by"
                )
            if lora.scale is not None:
                raise BundleError(f"lora.scale: lora {lora.name} is not fused; requests choose its scale")
        if self.unfused_loras and not get_backend(engine.backend).swaps_weights:
            raise BundleError(
                f'lora.fused: engine.backend = "{engine.backend}" cannot change weights between requests; '
                'fuse the LoRA, or use backend = "inductor"'
            )
        if self.unfused_loras and engine.precision == "fp8":
            raise BundleError(
                'lora.fused: weights in fp8 cannot change between requests; fuse the LoRA, or use precision = "fp16"'
            )

    def _check_face_encoder(self, section: FaceEncoderSection) -> None:
        folder = self.folder / section.path
        if not any(folder.glob("*.onnx")):
            raise BundleError(f"face_encoder.path: no .onnx files in {folder}; expected those of buffalo_l or similar")
        if any(size < 32 or size % 32 for size in section.det_size):
            raise BundleError(f"face_encoder.det_size: must be multiples of 32, got {list(section.det_size)}")
        if not 0 < section.det_thresh < 1:
            raise BundleError(f"face_encoder.det_thresh: must be above 0 and below 1, got {section.det_thresh:g}")
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
    def unfused_loras(self) -> tuple[LoraSection, ...]:
        """The LoRAs that requests choose."""
        return tuple(lora for lora in self.lora if not lora.fused)

    def denoiser_engines(self) -> list[str]:
        """List the names of the engines that the denoiser loads."""
        names = ["unet", "motion_unet"]
        names += [f"image_projection_{adapter.name}" for adapter in self.ip_adapter]
        names += [f"{part}_{net.name}" for net in self.controlnet for part in ("controlnet", "controlnet_embedding")]
        return names + [f"t2i_adapter_{adapter.name}" for adapter in self.t2i_adapter]

    def models(self) -> list[str]:
        """List the names of all Triton models that this bundle may have; some depend on its checkpoints."""
        parts = ["stream", "denoiser", *(f"denoiser_{gpu}" for gpu in self.engine.devices)]
        parts += sorted({encoder for family in all_families() for encoder, _ in family.text_encoders})
        parts += ["vae_encoder", "vae_decoder", "safety_checker", "face_encoder"]
        parts += [f"image_encoder_{adapter.name}" for adapter in self.ip_adapter]
        return [self.name, *(f"{self.name}_{part}" for part in parts)]

    def base_source(self) -> Source:
        """Return where the base is."""
        root = self.locate(self.base, "base")
        file = sources.single_file("base", root, self.weight_name)
        if file is None:
            self._check_no_config("config", self.config)
            return Source(root, variant=self.variant)
        self._check_no_variant("variant", self.variant)
        if self.config is not None:
            return Source(self.locate(self.config, "config"), file=file)
        return Source(self.locate(single_files.default_config(file), f"config, which {file.name} needs"), file=file)

    def networks(self) -> Iterator[Network]:
        """Yield each network besides the base."""
        config = self.base_source().config
        if self.unet is not None:
            yield Network("unet", self._source("unet", self.unet, Source(config, "unet")), "a UNet")
        if self.vae is not None:
            yield Network("vae", self._source("vae", self.vae, Source(config, "vae")), "a VAE")
        for net in self.controlnet:
            what = f"controlnet {net.name}"
            yield Network(what, self._source(what, net, Source(None)), "a ControlNet")
        for t2i in self.t2i_adapter:
            what = f"t2i_adapter {t2i.name}"
            yield Network(what, Source(self.locate(t2i.path, what), variant=t2i.variant), "a T2I-Adapter")
        if (motion := self.motion_adapter) is not None:
            source = Source(self.locate(motion.path, "motion_adapter"), variant=motion.variant)
            yield Network("motion_adapter", source, "a motion adapter")

    def source(self, what: str) -> Source | None:
        """Return where the network that messages call `what` is; None if the bundle has none."""
        return next((network.source for network in self.networks() if network.what == what), None)

    def _source(self, what: str, section: NetworkSection, default: Source) -> Source:
        """Return where a network is; for a single file without a configuration, that of `default`."""
        root = self.locate(section.path, what)
        file = sources.single_file(what, root, section.weight_name)
        if file is None:
            self._check_no_config(f"{what}: config", section.config)
            return Source(root, variant=section.variant)
        self._check_no_variant(f"{what}: variant", section.variant)
        if section.config is None:
            return default._replace(file=file)
        return Source(self.locate(section.config, what), file=file)

    def _check_no_config(self, key: str, config: str | None) -> None:
        if config is not None:
            raise BundleError(f"{key}: only a single file needs one; a diffusers folder has its own: leave it out")

    def _check_no_variant(self, key: str, variant: str | None) -> None:
        if variant is not None:
            raise BundleError(f"{key}: only diffusers folders have variants; name the file of the variant itself")

    def locate(self, path: str, what: str = "path") -> str:
        """Return a path relative to the bundle file as an absolute path or a hub id (`sources.locate`)."""
        return sources.locate(what, self.folder, path)

    def lora_file(self, lora: LoraSection) -> Path:
        """Return the weight file of a LoRA."""
        what = f"lora {lora.path}"
        return sources.weights_file(what, self.locate(lora.path, what), lora.subfolder or "", lora.weight_name)

    def embedding_file(self, embedding: TextualInversionSection) -> Path:
        """Return the file of a textual inversion embedding."""
        what = f"textual_inversion {embedding.path}"
        root = self.locate(embedding.path, what)
        return sources.weights_file(what, root, embedding.subfolder or "", embedding.weight_name)

    def adapter_file(self, adapter: IPAdapterSection) -> Path:
        """Return the weight file of an adapter."""
        what = f"ip_adapter {adapter.name}"
        return sources.weights_file(what, self.locate(adapter.path, what), adapter.subfolder, adapter.weight_name)

    def image_encoder(self, adapter: IPAdapterSection) -> tuple[str, str] | None:
        """Return the root and subfolder of an adapter's image encoder, found as in diffusers; None if it needs none."""
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
                "set image_encoder_folder (false for FaceID adapters, and if requests only bring embeddings)"
            )
        checkpoint_kinds.model_config(what, root, subfolder, "a CLIP image encoder")
        return root, subfolder


def _numbers(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in `section` with its key."""
    for name in section.__struct_fields__:
        values = getattr(section, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, msgspec.Struct):
                yield from _numbers(value, f"{prefix}{name}.")
            elif isinstance(value, int | float):
                yield f"{prefix}{name}", value


def _check_keys(content: Mapping[str, Any], section: type[msgspec.Struct], place: str) -> None:
    """Refuse keys that `section` does not have, and suggest what may have been meant."""
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
    """Return the keys of a section; the value is the section's type for keys that are sections, else None."""
    found = {}
    for field in msgspec.structs.fields(section):
        types = (field.type, *getattr(field.type, "__args__", ()))
        found[field.name] = next((t for t in types if isinstance(t, type) and issubclass(t, msgspec.Struct)), None)
    return found


def _elsewhere(key: str, section: type[msgspec.Struct]) -> str:
    """Return the end of a message about an unknown key: the section that has it, or the documentation."""
    homes = {name: inner for name, inner in _sections(BundleFile).items() if inner is not None and inner is not section}
    home = next((name for name, inner in homes.items() if key in _sections(inner)), None)
    if section is not BundleFile and key in _sections(BundleFile) and key != "name":
        return "; it belongs at the top of the file, not in a section"
    return f"; it belongs in [{home}]" if home else "; see docs/bundle.md for the known keys"


def _place_first(message: str) -> str:
    """Put the key first in a message of msgspec: `shapes.rows: expected ...`."""
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
