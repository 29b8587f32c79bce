"""Mutate requests: change one input at a time, within its declared type or against it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzz import pictures, schedulers, values
from fuzz.target import Input, Model, Target
from fuzz.tensors import NUMPY, Tensor, Tensors, tensor

_DTYPES = (*NUMPY, "BYTES", "INT8", "INT16", "UINT16", "UINT32", "BF16", "STRING", "", "fp64", "X" * 300)
_SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (0,), (1,), (2,), (3,), (65,), (1, 1), (0, 0), (-1,), (-(2**63),), (2**31,), (2**62,), (2**63 - 1,)),
    *((2**32, 2**32), (1,) * 20, (2, 0, 128), (2, 1, 128), (1, 1, 65, 128), (2**16, 2**16, 2**16, 2**16)),
)
_UNKNOWN = ("nonsense", "", "PROMPT", "prompt ", "ip_adapter_image_embeds_", "job", "secret", "x" * 500, "\u4e2d")
_PICTURE_WORDS = ("image", "mask", "masks", "video")

Mutation = Callable[[Random, Target, Model, Tensors], None]


def mutate(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    """Apply one to three mutations to `inputs` for a pipeline `model`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choices([mutation for mutation, _ in _WEIGHTED], [weight for _, weight in _WEIGHTED])[0](
            rng, target, model, inputs
        )


def well_typed(rng: Random, target: Target, declared: Input) -> Tensor:
    """Draw any value of the declared type; only our server, not Triton, can reject it."""
    name, dtype = declared.name, declared.dtype
    if dtype == "BYTES":
        if name.endswith("_config"):
            return tensor(dtype, [values.json_text(rng)])
        if name.split("_")[-1] in _PICTURE_WORDS and name != "encode_image":
            return tensor(dtype, pictures.pictures(rng))
        return tensor(dtype, values.texts(rng, _words(target, name)))
    if len(declared.dims) > 1:
        return tensor(dtype, values.numbers(rng, dtype, declared.dims))
    if dtype == "BOOL":
        return tensor(dtype, [rng.random() < 0.5 for _ in range(rng.choice(values.COUNTS))])
    return tensor(dtype, values.floats(rng) if dtype.startswith("FP") else values.integers(rng, dtype))


def malformed(rng: Random, given: Tensor) -> Tensor:
    """Return `given` with inconsistent data type, shape or bytes, which Triton should reject."""
    data = given.data or b""
    match rng.randrange(5):
        case 0:
            return Tensor(dtype=rng.choice(_DTYPES), shape=given.shape, data=data)
        case 1:
            return Tensor(dtype=given.dtype, shape=rng.choice(_SHAPES), data=data)
        case 2:
            return Tensor(dtype=given.dtype, shape=given.shape, data=None)
        case 3:
            cut = rng.choice(
                (data[:-1], data + b"\0", data[: len(data) // 2], b"", data * 2, b"\xff\xff\xff\xff" + data[4:])
            )
            return Tensor(dtype=given.dtype, shape=given.shape, data=cut)
        case _:
            return Tensor(dtype=rng.choice(_DTYPES), shape=rng.choice(_SHAPES), data=rng.randbytes(rng.randrange(64)))


def _hostile_value(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    declared = rng.choice(model.inputs)
    inputs[declared.name] = well_typed(rng, target, declared)


def _hostile_neighbor(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    """Change the value of an input that the request already has, so that the rest stays consistent."""
    given = [declared for declared in model.inputs if declared.name in inputs]
    if given:
        declared = rng.choice(given)
        inputs[declared.name] = well_typed(rng, target, declared)


def _break_form(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    if inputs:
        name = rng.choice(sorted(inputs))
        inputs[name] = malformed(rng, inputs[name])


def _declared_otherwise(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    """Replace an input with a well-formed tensor of another type than declared."""
    declared = rng.choice(model.inputs)
    dtype = rng.choice(("BYTES", *NUMPY))
    other = Input(name="other", dtype=dtype, dims=rng.choice((declared.dims, (-1, -1))))
    inputs[declared.name] = well_typed(rng, target, other)


def _drop(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    if inputs:
        del inputs[rng.choice(sorted(inputs))]


def _add_unknown(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    internal = [declared for part in target.internal for declared in part.inputs]
    if rng.random() < 0.5 and internal:
        declared = rng.choice(internal)
        inputs[declared.name] = well_typed(rng, target, declared)
    else:
        inputs[rng.choice(_UNKNOWN)] = tensor("FP64", [1.0])


def _scheduler_config(rng: Random, target: Target, model: Model, inputs: Tensors) -> None:
    chosen = rng.choice(target.capabilities["schedulers"])
    inputs["scheduler"] = tensor("BYTES", [chosen])
    inputs["scheduler_config"] = tensor("BYTES", [schedulers.config_text(rng, chosen)])
    if rng.random() < 0.3:
        inputs["num_inference_steps"] = tensor("INT32", [rng.choice((1, 3, 7))])


_WEIGHTED: tuple[tuple[Mutation, int], ...] = (
    (_hostile_value, 5),
    (_hostile_neighbor, 6),
    (_scheduler_config, 5),
    (_break_form, 3),
    (_declared_otherwise, 1),
    (_drop, 1),
    (_add_unknown, 1),
)


def _words(target: Target, name: str) -> tuple[str, ...]:
    """List words that are meaningful to a text input."""
    adapters = tuple(str(adapter["name"]) for adapter in target.adapters)
    if name.endswith("_adapter") or name == "encode_image":
        return (*adapters, target.bundle)
    return {
        "scheduler": tuple(target.capabilities["schedulers"]),
        "controlnet": tuple(target.capabilities["controlnets"]),
        "control_image_annotator": ("none", "canny"),
        "ip_adapter_image_per": ("request", "prompt", "frame"),
        "ip_adapter_weight_type": (
            "linear",
            "style",
            "composition",
            "style and composition",
            "ease in",
            "strong middle",
        ),
        "output_type": ("np", "latent", "pil"),
        "output_format": ("png", "jpeg", "webp", "gif"),
    }.get(name, adapters)
