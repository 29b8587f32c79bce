"""Load the base of a bundle as a diffusers pipeline: from a folder or a single file, with parts replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from imprompt_export import textual_inversion
from imprompt_export.bundle import BundleFile
from imprompt_export.errors import BundleError, did_you_mean, refusing, some_of
from imprompt_export.families import family_of
from imprompt_export.sections import DefaultsSection
from imprompt_export.sources import Source, read_json

_REPLACEABLE = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


def load_base(bundle: BundleFile) -> Any:
    """Load the base in float32 on the CPU, with its textual inversion embeddings and the scheduler of `[defaults]`.

    Raises:
        BundleError: a part of it cannot be loaded, or lacks weights.
    """
    source = bundle.base_source()
    parts = {
        name: load_network(name, model, place)
        for name, model in _REPLACEABLE.items()
        if (place := bundle.source(name)) is not None
    }
    with _loading(f"base: {bundle.base}", "cannot be loaded as a diffusers pipeline"):
        if source.file is None:
            pipeline = DiffusionPipeline.from_pretrained(
                source.config, dtype=torch.float32, variant=source.variant, **parts
            )
        else:
            index = read_json("base", str(source.config), "model_index.json")
            pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
                str(source.file), config=source.config, **parts
            )
    for name, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            _complete(f"base: {name}", model)
    # Each pipeline class corrects outdated scheduler configurations in its own way, so start from the original here;
    # the denoiser applies the corrections of the pipeline for each task.
    scheduler = type(pipeline.scheduler).from_pretrained(source.config, subfolder="scheduler")
    pipeline.scheduler = _with_defaults(scheduler, bundle.defaults)
    textual_inversion.load(bundle, pipeline, family_of(type(pipeline).__name__, pipeline.config))
    return pipeline


def load_network(what: str, model: Any, source: Source) -> Any:
    """Load a network of the diffusers class `model`, in float32.

    Raises:
        BundleError: it cannot be loaded, or lacks weights.
    """
    subfolder = source.subfolder or None
    with _loading(f"{what}: {source.file or source.config}", "cannot be loaded"):
        if source.file is None:
            loaded = model.from_pretrained(source.config, subfolder=subfolder, variant=source.variant)
        else:
            loaded = model.from_single_file(str(source.file), config=source.config, subfolder=subfolder)
    return _complete(what, loaded)


@contextmanager
def _loading(what: str, problem: str) -> Iterator[None]:
    """Turn the errors of diffusers' loaders into a `BundleError`."""
    with refusing(f"{what} {problem}"):
        try:
            yield
        except NotImplementedError:  # torch cannot move weights that have no values
            raise BundleError(f"{what} is incomplete: it lacks weights of its configuration") from None


def _complete(what: str, model: Any) -> Any:
    """Return a network in float32; refuse one whose file lacks weights, which diffusers leaves without values."""
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise BundleError(f"{what} is incomplete: it has no {some_of(missing, 2)}")
    return model.float().eval()


def _with_defaults(scheduler: Any, defaults: DefaultsSection) -> Any:
    """Return the scheduler that requests get unless they name another.

    Raises:
        BundleError: the class does not have a key of `scheduler_config`, or refuses a value.
    """
    kind = type(scheduler) if defaults.scheduler is None else getattr(diffusers, defaults.scheduler)
    if kind is type(scheduler) and not defaults.scheduler_config:
        return scheduler
    known = kind._get_init_keys(kind) - {"self"}
    for key in defaults.scheduler_config:
        if key not in known:
            raise BundleError(f"defaults.scheduler_config: {kind.__name__} has no {key}{did_you_mean(key, known)}")
    with refusing(f"defaults.scheduler_config: {kind.__name__}"):
        return kind.from_config(scheduler.config, **defaults.scheduler_config)
