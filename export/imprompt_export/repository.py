"""Write the Triton models of a bundle: for each a folder with `config.pbtxt`, and its files in version `1`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from imprompt_export.backends import export_backend
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.graphs import Graph, level_axes
from imprompt_export.install import OWNER
from imprompt_serving import config
from imprompt_serving.backends import get_backend
from imprompt_serving.capabilities import capabilities
from imprompt_serving.specs import Bundle
from imprompt_serving.wire import Tensor

_SHIM = '"""Load the model from the installed package, so that every repository runs that version."""\n\n' + (
    'from imprompt_serving.triton.{module} import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'
)
_IN_DENOISER = ("unet", "image_projection_", "controlnet_", "motion_unet", "t2i_adapter_")
_CACHED = ("text_encoder", "image_encoder_")
_DTYPES = {"normal": "FP32", "unit": "FP32", "timestep": "FP32", "bias": "FP32", "scale": "FP32", "index": "INT64"}


def write_models(
    root: Path,
    bundle: Bundle,
    host: str,
    graphs: Mapping[str, Graph],
    files: Mapping[str, Path],
    checkpoints: Checkpoints,
) -> None:
    """Write all models of `bundle` to `root`, and move the engines there.

    Args:
        root: the folder for the models.
        bundle: the bundle.
        host: `engine.host`.
        graphs: the graphs by name.
        files: the engine of each graph.
        checkpoints: the checkpoints, for tokenizers and face models.
    """
    described = json.dumps(capabilities(bundle))
    for stream in (False, True):
        model = config.pipeline(bundle, stream=stream, capabilities=described)
        folder = _write(root, bundle, model, "pipeline")
        _save_tokenizers(folder, checkpoints)
        bundle.save(folder)
    folder, *others = (_write(root, bundle, config.denoiser(bundle, name), "denoiser") for name in bundle.denoisers)
    bundle.save(folder)
    if bundle.face_encoder:
        folder_of_faces = _write(root, bundle, config.face_encoder(bundle), "face_encoder")
        bundle.save(folder_of_faces)
        for name, file in checkpoints.face_models.items():
            shutil.copyfile(file, folder_of_faces / f"{name}.onnx")
    for name, graph in graphs.items():
        if name.startswith(_IN_DENOISER):
            _move(files[name], folder, name)
        else:
            model = _engine_config(bundle, host, graph)
            _move(files[name], _write(root, bundle, model, "engine" if host == "python" else None), "model")
    for other in others:
        _link(folder, other)


def _write(root: Path, bundle: Bundle, model: pb.ModelConfig, module: str | None) -> Path:
    """Write the configuration of one model and its `model.py`; return its version folder."""
    folder = root / model.name / "1"
    folder.mkdir(parents=True)
    (root / model.name / "config.pbtxt").write_text(config.to_pbtxt(model))
    (root / model.name / OWNER).write_text(f"{bundle.name}\n")
    if module is not None:
        (folder / "model.py").write_text(_SHIM.format(module=module))
    return folder


def _engine_config(bundle: Bundle, host: str, graph: Graph) -> pb.ModelConfig:
    """Make the configuration of an engine; all shapes start with the batch axis, which Triton adds by itself."""
    inputs = [Tensor(tensor.name, _DTYPES[tensor.values], _dims(tensor.shape)) for tensor in graph.inputs]
    outputs = [
        Tensor(name, graph.output_dtypes.get(name, "FP32"), _dims(shape)) for name, shape in graph.outputs.items()
    ]
    needs_gpu = get_backend(bundle.backend).needs_gpu
    # By default Triton creates an instance of the engines that it hosts on every GPU.
    devices = bundle.devices or ((0,) if needs_gpu and host == "native" else ())
    return config.engine(
        bundle.model(graph.name),
        inputs,
        outputs,
        backend=bundle.backend,
        host=host,
        threads=bundle.threads,
        # With ONNX Runtime in a Python process, the CPU build may be installed, which Triton would refuse on a GPU.
        devices=devices if needs_gpu or host == "native" else (),
        max_batch_size=export_backend(bundle.backend).max_batch_size(graph, bundle),
        usual_dims=_usual_dims(graph, bundle),
        cache=graph.name.startswith(_CACHED),
    )


def _usual_dims(graph: Graph, bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Return the dims of one row of each input, for pictures of the default size."""
    sizes = {"height": bundle.default_height, "width": bundle.default_width}
    latent = (size // bundle.vae_scale_factor for size in sizes.values())
    sizes |= dict(zip(level_axes(0), latent, strict=True))
    return {
        tensor.name: tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape[1:])
        for tensor in graph.inputs
    }


def _dims(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape[1:])


def _move(file: Path, folder: Path, stem: str) -> None:
    """Move an engine and its companion files, renamed to `stem`; external data keeps the name in the ONNX file."""
    for part in [part for part in file.parent.iterdir() if part.is_file()]:
        part.rename(folder / (part.name if part.suffix == ".data" else f"{stem}{part.name.removeprefix(file.stem)}"))


def _link(folder: Path, other: Path) -> None:
    """Add the files of `folder` that `other` lacks, as hard links if possible to save disk space."""
    for file in folder.iterdir():
        if not (other / file.name).exists():
            try:
                os.link(file, other / file.name)
            except OSError:
                shutil.copyfile(file, other / file.name)


def _save_tokenizers(folder: Path, checkpoints: Checkpoints) -> None:
    for engine, tokenizer in checkpoints.family.text_encoders:
        getattr(checkpoints.pipeline, tokenizer).backend_tokenizer.save(str(folder / f"{engine}.tokenizer.json"))
