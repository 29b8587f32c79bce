"""Build the case for a given seed and index; it is the same on every machine with the same Pillow and diffusers."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tritonclient.grpc import service_pb2

from fuzz import keywords, pictures, valid, values
from fuzz.mutations import malformed, mutate, well_typed
from fuzz.target import Model, Target
from fuzz.tensors import Tensors, message, tensor, tensors
from fuzz.transports import Crowd, Http, Sdk, Sendable, Stream, Unary

_IDS = ("", "a", "x" * 500, " ", "\n", "\u4e2d", "%s", "../..", "0")
_TIMES = 6
"""How often each member of a crowd sends its request; Triton batches only requests that wait at the same moment."""
_PARAMETERS = (
    *("priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", "classification"),
    *("triton_enable_empty_final_response", "triton_final_response", "correlation_id", "max_tokens", "nonsense", ""),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A request to send, and what to expect. `kind` is one of `KINDS`."""

    seed: int
    index: int
    kind: str
    text: str
    """A description for reports."""
    sendable: Sendable
    harmless: bool = False
    """Whether it must succeed."""
    forbidden: bool = False
    """Whether it must not succeed, because it asks for something that callers may not access."""

    def __str__(self) -> str:
        return f"case {self.index} of seed {self.seed}, {self.kind}: {self.text}"


def case(seed: int, index: int, targets: Sequence[Target], *, http: bool = False) -> Case:
    """Build the case with this seed and index; `http` tells whether the server has an HTTP port."""
    rng = Random(f"{seed}/{index}")
    target = rng.choice(targets)
    kinds = {kind: weight for kind, (weight, _) in KINDS.items() if http or kind != "http"}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    text, sendable = KINDS[kind][1](rng, target)
    return Case(
        seed=seed,
        index=index,
        kind=kind,
        text=f"{target.bundle}: {text}",
        sendable=sendable,
        harmless=kind == "harmless",
        forbidden=kind in ("internal", "admin"),
    )


def _harmless(rng: Random, target: Target) -> tuple[str, Sendable]:
    given = valid.valid(rng, target)
    inputs = tensors(target.pipeline, given)
    match rng.randrange(3):
        case 0 if "encode_image" not in given:
            method, arguments = rng.choice(("generate", "stream")), keywords.as_keywords(given, target)
            return f"{method}({_names(given)})", Sdk(method=method, keywords={"model": target.bundle, **arguments})
        case 1:
            request = message(target.stream.name, inputs)
            return f"stream of {_names(given)}", Stream(data=(request.SerializeToString(),))
        case _:
            return _names(given), Unary(data=message(target.pipeline.name, inputs).SerializeToString())


def _unary(rng: Random, target: Target) -> tuple[str, Sendable]:
    text, inputs = _mutated(rng, target, target.pipeline)
    return text, Unary(data=message(target.pipeline.name, inputs).SerializeToString())


def _stream(rng: Random, target: Target) -> tuple[str, Sendable]:
    model = rng.choices((target.stream, target.pipeline), (9, 1))[0]
    requests = [_mutated(rng, target, model) for _ in range(rng.choice((1, 1, 1, 1, 3)))]
    read = rng.choice((None, None, None, 1, 2))
    stay = rng.random() < 0.2
    text = f"{model.name}, read {read or 'all'}, stay {stay}: {' | '.join(change for change, _ in requests)}"
    data = tuple(message(model.name, inputs).SerializeToString() for _, inputs in requests)
    return text, Stream(data=data, read=read, stay=stay)


def _leaver(rng: Random, target: Target) -> tuple[str, Sendable]:
    """A caller that disconnects in the middle of a long, harmless request."""
    given = valid.valid(rng, target) | {"num_inference_steps": [60]}
    after = round(rng.random() * 0.3, 3)
    text = f"leaves after {after} s: {_names(given)}"
    if rng.random() < 0.5:
        data = message(target.pipeline.name, tensors(target.pipeline, given)).SerializeToString()
        return text, Unary(data=data, leave_after=after)
    data = message(target.stream.name, tensors(target.stream, given)).SerializeToString()
    return f"stream, {text}", Stream(data=(data,), leave_after=after)


def _envelope(rng: Random, target: Target) -> tuple[str, Sendable]:
    """Harmless tensors in a request with an odd id, parameter, version or output, or with a duplicate input."""
    model = rng.choice((target.pipeline, target.stream))
    request = message(model.name, tensors(target.pipeline, valid.valid(rng, target)))
    done = " and ".join(_disguise(rng, model, request) for _ in range(rng.choice((1, 1, 2))))
    data = request.SerializeToString()
    return f"{model.name} with {done}", Unary(data=data) if model is target.pipeline else Stream(data=(data,))


def _disguise(rng: Random, model: Model, request: Any) -> str:
    match rng.randrange(6):
        case 0:
            request.id = rng.choice(_IDS)
            return f"id {request.id[:20]!r}"
        case 1:
            wanted = rng.choice((rng.sample(model.outputs, 2), [*model.outputs], ["nonsense"], [""], ["seeds"] * 2))
            del request.outputs[:]
            for name in wanted:
                request.outputs.add(name=name)
            return f"outputs {wanted}"
        case 2:
            name, number = rng.choice(_PARAMETERS), rng.choice((0, 1, -1, 2**63 - 1))
            holder = rng.choice((request.parameters, request.inputs[0].parameters))
            holder[name].int64_param = number
            return f"parameter {name!r} = {number}"
        case 3:
            name = rng.choice(("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", *_PARAMETERS))
            request.inputs[0].parameters[name].string_param = rng.choice(_IDS)
            return f"parameter {name!r} of an input, a text"
        case 4:
            request.model_version = rng.choice(("1", "0", "-1", "2", "x", "99999999999999999999"))
            return f"version {request.model_version}"
        case _:
            twin = rng.randrange(len(request.inputs))
            request.inputs.add().CopyFrom(request.inputs[twin])
            request.raw_input_contents.append(request.raw_input_contents[twin])
            return f"two of {request.inputs[twin].name}"


def _flipped(rng: Random, target: Target) -> tuple[str, Sendable]:
    """A serialized request with some of its bytes changed."""
    model = rng.choice((target.pipeline, target.stream))
    data = message(model.name, tensors(target.pipeline, valid.valid(rng, target))).SerializeToString()
    data = pictures.corrupt(rng, data)
    return f"{model.name}, corrupted bytes", Unary(data=data) if model is target.pipeline else Stream(data=(data,))


def _sdk(rng: Random, target: Target) -> tuple[str, Sendable]:
    if rng.random() < 0.1:
        adapter = rng.choice([*(adapter["name"] for adapter in target.adapters), "", 1, None])
        images = keywords.odd_value(rng, target)
        arguments: dict[str, Any] = {"model": target.bundle, "adapter": adapter, "images": images}
        return f"encode_image({_values(arguments)})", Sdk(method="encode_image", keywords=arguments)
    method = rng.choice(("generate", "stream"))
    arguments = {"prompt": "a", **keywords.as_keywords(valid.valid(rng, target), target)}
    arguments.pop("encode_image", None)
    keywords.corrupt(rng, target, arguments)
    read = rng.choice((None, 1)) if method == "stream" else None
    return f"{method}({_values(arguments)})", Sdk(
        method=method, keywords={"model": target.bundle, **arguments}, read=read
    )


def _internal(rng: Random, target: Target) -> tuple[str, Sendable]:
    """A direct call of a model that only the pipeline may call."""
    model = rng.choice(target.internal)
    inputs = _internal_inputs(rng, target, model)
    data = message(model.name, inputs).SerializeToString()
    return f"{model.name} {_shown(inputs)}", Stream(data=(data,)) if model.decoupled else Unary(data=data)


def _internal_inputs(rng: Random, target: Target, model: Model) -> Tensors:
    if model.decoupled:
        return _denoiser_inputs(rng, target, model)
    inputs = {
        declared.name: tensor(declared.dtype, values.numbers(rng, declared.dtype, declared.dims))
        if declared.dtype != "BYTES"
        else tensor("BYTES", [pictures.picture(rng)])
        for declared in model.inputs
    }
    if rng.random() < 0.3:
        name = rng.choice(sorted(inputs))
        inputs[name] = malformed(rng, inputs[name])
    return inputs


def _denoiser_inputs(rng: Random, target: Target, model: Model) -> Tensors:
    """A job, an admission request or a cancellation for the denoiser, valid or not."""
    job_id = rng.choice((uuid.UUID(int=rng.getrandbits(128)).hex, "", "a"))
    place = {"id": job_id, "rows": rng.choice((1, 10**6, -1)), "steps": rng.choice((1, 1000)), "shape": "q"}
    job = {
        "id": job_id,
        "height": rng.choice((64, -64, 0, 10**9)),
        "width": 64,
        "num_inference_steps": rng.choice((1, 0, -1, 10**6)),
        "guidance_scale": rng.choice((7.5, 1.0)),
        "seeds": rng.choice(([], [0], [2**70])),
        "scheduler_config": rng.choice(({}, {"solver_order": 0})),
    }
    documents = {"job": json.dumps(job), "admit": json.dumps(place), "cancel": job_id}
    inputs = {}
    for name in rng.sample(sorted(documents), rng.choice((1, 1, 1, 2, 3))):
        text = documents[name].encode() if rng.random() < 0.7 else values.json_text(rng)
        inputs[name] = tensor("BYTES", [text] * rng.choice((1, 1, 1, 0, 2)))
    for declared in rng.sample(model.inputs, rng.choice((0, 0, 1, 3))):
        inputs[declared.name] = well_typed(rng, target, declared)
    return inputs


def _crowd(rng: Random, target: Target) -> tuple[str, Sendable]:
    """Strangers and bad requests at the same time as a harmless one."""
    model = rng.choice([model for model in target.internal if not model.decoupled])
    makers: Sequence[Callable[[], tuple[str, Sendable]]] = (
        lambda: _unary(rng, target),
        lambda: _of_model(_internal_inputs(rng, target, model), model),
    )
    maker = rng.choice(makers)
    made = [maker() for _ in range(rng.randint(2, 6))]
    harmless = message(target.pipeline.name, tensors(target.pipeline, valid.small(target)))
    text = f"{len(made)} at once, {_TIMES} times, such as {made[0][0]}"
    cases = tuple(one for _, one in made)
    return text, Crowd(cases=cases, harmless=Unary(data=harmless.SerializeToString()), times=_TIMES)


def _of_model(inputs: Tensors, model: Model) -> tuple[str, Sendable]:
    return f"{model.name} {_shown(inputs)}", Unary(data=message(model.name, inputs).SerializeToString())


def _admin(rng: Random, target: Target) -> tuple[str, Sendable]:
    """What changes the server itself."""
    pb = service_pb2
    method, request = rng.choice(
        (
            ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=64)),
            ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()),
            ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(name="x", raw_handle=b"x", byte_size=64)),
            ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=target.bundle)),
            ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=target.bundle)),
            ("TraceSetting", pb.TraceSettingRequest(model_name=target.bundle)),
            ("LogSettings", pb.LogSettingsRequest()),
        )
    )
    return method, Unary(method=method, data=request.SerializeToString())


def _http(rng: Random, target: Target) -> tuple[str, Sendable]:
    """Like `_unary`, but as JSON for one of Triton's HTTP paths, intact or corrupted."""
    given = valid.valid(rng, target)
    for name in rng.sample(sorted(given), min(2, len(given))):
        given[name] = rng.choice((values.json_value(rng), [values.json_value(rng)], given[name]))
    inputs = []
    for name, value in given.items():
        declared = target.pipeline.input(name)
        data = value if not hasattr(value, "tolist") else value.ravel().tolist()
        shape = [len(data)] if isinstance(data, list) else [1]
        inputs.append({"name": name, "datatype": declared and declared.dtype, "shape": shape, "data": data})
    body: dict[str, Any] = {"id": "x", "inputs": inputs, "outputs": [{"name": "seeds"}]}
    path = rng.choice(("infer", "infer", "infer", "generate", "generate_stream"))
    if path != "infer":
        body = {name: value if not isinstance(value, list) else value[:1] for name, value in given.items()}
    encoded = json.dumps(body, default=_json_bytes).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        encoded = encoded.replace(b'"id": "x"', b'"id": "\xff\xfe"')
    elif rng.random() < 0.4:
        encoded = pictures.corrupt(rng, encoded)
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.1:
        headers["Inference-Header-Content-Length"] = rng.choice(("0", "-1", "5", "999999999", "x"))
    model = target.pipeline if path != "generate_stream" else target.stream
    text = f"{path} {encoded[:200]!r} {headers}"
    return text, Http(path=f"/v2/models/{model.name}/{path}", body=encoded, headers=headers)


def _json_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode()


KINDS: dict[str, tuple[int, Callable[[Random, Target], tuple[str, Sendable]]]] = {
    "harmless": (6, _harmless),
    "unary": (36, _unary),
    "stream": (16, _stream),
    "sdk": (14, _sdk),
    "leaver": (5, _leaver),
    "envelope": (5, _envelope),
    "flipped": (6, _flipped),
    "internal": (7, _internal),
    "crowd": (4, _crowd),
    "admin": (1, _admin),
    "http": (8, _http),
}
"""Kinds of cases by name: their weight, and the function that builds them."""


def _mutated(rng: Random, target: Target, model: Model) -> tuple[str, Tensors]:
    """Build a mutated request and a description of the changes."""
    given = tensors(target.pipeline, valid.valid(rng, target))
    inputs = dict(given)
    mutate(rng, target, model, inputs)
    changed = _shown({name: value for name, value in inputs.items() if given.get(name) != value})
    dropped = "".join(f", without {name}" for name in given if name not in inputs)
    return (
        f"{changed}{dropped}; unchanged: {_names(name for name in inputs if given.get(name) == inputs[name])}",
        inputs,
    )


def _names(given: Iterable[str]) -> str:
    return ", ".join(name for name in given if name not in ("height", "width", "timeout"))


def _shown(inputs: Tensors) -> str:
    return ", ".join(f"{name} {given}" for name, given in inputs.items())


def _values(arguments: dict[str, Any]) -> str:
    shown = []
    for name, value in arguments.items():
        try:
            text = re.sub(r" at 0x\w+", "", repr(value))[:80]
        except ValueError:  # an integer with too many digits
            text = f"a huge {type(value).__name__}"
        shown.append(f"{name}={text}")
    return ", ".join(shown)
