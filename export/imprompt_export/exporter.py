"""Export a bundle: load its checkpoints, build and compare its engines, and write its Triton models."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TimeElapsedColumn

from imprompt_export import control, graphs, image_prompt, report, t2i
from imprompt_export.backends import export_backend
from imprompt_export.bundle import BundleFile
from imprompt_export.checkpoints import Checkpoints, LoadedAdapter, load
from imprompt_export.fp16_vae import fit_fp16_range
from imprompt_export.garbage import LARGE_GARBAGE, rare_collections
from imprompt_export.graphs import Graph
from imprompt_export.parity import check_parity, compare, references
from imprompt_export.preview import fit_preview
from imprompt_export.repository import write_models
from imprompt_export.sections import EngineSection
from imprompt_export.stages import Stages
from imprompt_serving import specs


def export_bundle(bundle: BundleFile, work: Path, console: Console | None, refit_from: Path | None) -> report.Report:
    """Export `bundle` into the folder `models` in `work`, and compare each engine with PyTorch.

    Raises:
        BundleError: checkpoints do not fit together.
        ParityError: an engine's results differ from PyTorch's by more than is allowed, or quantization loses too much
            quality.
        EngineError: an engine cannot be built.
    """
    console = console or Console(stderr=True)
    engine, backend = bundle.engine, export_backend(bundle.engine.backend)
    comparison_backend = backend.comparison_backend(engine)
    if comparison_backend is None:
        console.print(f"{engine.precision} cannot run on this machine: the engines will not be compared with PyTorch")
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn())
    with (
        backend.builder(engine, refit_from) as start_build,
        Progress(*columns, console=console) as progress,
        rare_collections(),
    ):
        task = progress.add_task("loading checkpoints", total=None)
        checkpoints = load(bundle)
        for note in checkpoints.notes:
            console.print(note)
        spec = describe(bundle, checkpoints)
        graphs_to_build = backend.calibrate(
            engine,
            spec,
            checkpoints,
            bundle_graphs(bundle, checkpoints),
            lambda line: progress.update(task, description=line, total=None),
        )
        progress.update(task, total=len(graphs_to_build))
        export_report = report.Report()
        engines: dict[str, Path] = {}
        built = reused = garbage = 0
        stages = [Stages(show=partial(_show_status, progress, task, graph.name)) for graph in graphs_to_build]
        pending = [
            start_build(graph, Path(work, graph.name), spec, stages_of_graph)
            for graph, stages_of_graph in zip(graphs_to_build, stages, strict=True)
        ]
        for number, (graph, wait, watch) in enumerate(zip(graphs_to_build, pending, stages, strict=True), 1):
            result = wait()
            engines[graph.name] = result.file
            built, reused = built + result.packages_built, reused + result.packages_reused
            expected = []
            if comparison_backend is not None:
                with watch.time("running PyTorch"):
                    sizes = export_backend(comparison_backend).check_axes(graph, spec)
                    expected = references(graph, sizes)
            garbage += sum(weight.nbytes for weight in graph.module.parameters())
            if backend.is_exported(engine, graph):
                _drop_weights(graph, graphs_to_build[number:])
            if garbage >= LARGE_GARBAGE:
                gc.collect()  # the traced program
            if comparison_backend is not None:
                with watch.time("running the engine"):
                    file = result.file if comparison_backend == backend.name else result.source
                    rows = compare(graph, expected, file, comparison_backend, engine.precision)
                export_report.engines += [report.EngineRow.of(row, export_seconds=result.seconds) for row in rows]
                check_parity(rows)
            if garbage >= LARGE_GARBAGE:
                gc.collect()  # the engine
                garbage = 0
            console.print(f"{graph.name}: {watch}", soft_wrap=True)
            progress.advance(task)
        if built or reused:
            console.print(f"{built} packages built, {reused} reused from earlier exports")
        by_name = {graph.name: graph for graph in graphs_to_build}
        last = Stages(show=lambda line: progress.update(task, description=line, total=None))
        files, export_report.quality = backend.finish(engine, spec, checkpoints, by_name, engines, last)
        if last.seconds:
            console.print(f"{engine.precision}: {last}", soft_wrap=True)
        models = work / "models"
        write_models(models, spec, engine.host, by_name, files, checkpoints)
        report.save(export_report, models / bundle.name, spec, run_by=comparison_backend)
    return export_report


def _show_status(progress: Progress, task: TaskID, name: str, line: str) -> None:
    progress.update(task, description=f"{name}: {line}")


def _drop_weights(graph: Graph, later: Sequence[Graph]) -> None:
    """Free the weights of `graph` in PyTorch, unless one of the graphs `later` shares some of them."""
    shared = {id(weight) for other in later for weight in other.module.parameters()}
    if shared.isdisjoint(map(id, graph.module.parameters())):
        for tensor in (*graph.module.parameters(), *graph.module.buffers()):
            tensor.data = tensor.new_empty(0)  # also for those who keep the tensor, such as the traced program


def bundle_graphs(bundle: BundleFile, checkpoints: Checkpoints) -> list[Graph]:
    """Every graph of a bundle, the UNet last: tracing it replaces its attention processors."""
    pipeline, family = checkpoints.pipeline, checkpoints.family
    graphs_to_build = [
        graphs.text_encoder(
            name, getattr(pipeline, name), getattr(pipeline, tokenizer).model_max_length, penultimate=family.penultimate
        )
        for name, tokenizer in family.text_encoders
    ]
    graphs_to_build += [graphs.image_encoder(name, model) for name, model in checkpoints.image_encoders.items()]
    graphs_to_build += [graphs.image_projection(a.name, a.projection, a.embeds) for a in checkpoints.adapters]
    precisions = _vae_precisions(bundle.engine, pipeline.vae)
    graphs_to_build.append(graphs.vae_encoder(pipeline.vae, pipeline.vae_scale_factor, precisions))
    graphs_to_build.append(graphs.vae_decoder(pipeline.vae, precisions))
    if getattr(pipeline, "safety_checker", None) is not None:
        graphs_to_build.append(graphs.safety_checker(pipeline.safety_checker))
    for name, net in checkpoints.controlnets.items():
        graphs_to_build += control.controlnet(name, net)
    features = _features(checkpoints)
    graphs_to_build += [t2i.t2i_adapter(name, model, features) for name, model in checkpoints.t2i_adapters.items()]
    names, residuals = [adapter.name for adapter in checkpoints.adapters], _residuals(checkpoints)
    if checkpoints.motion_unet is not None:
        graphs_to_build.append(graphs.unet(checkpoints.motion_unet, names, residuals, frames=True))
    graphs_to_build.append(graphs.unet(pipeline.unet, names, residuals, features))
    return [replace(g, loras=checkpoints.loras) if g.name in ("unet", "motion_unet") else g for g in graphs_to_build]


def _vae_precisions(engine: EngineSection, vae: Any) -> graphs.Precisions:
    if not export_backend(engine.backend).fp16_vae:
        return graphs.AS_ENGINE
    half = engine.precision in ("fp16", "bf16", "fp8")
    return graphs.FP16_FOR_BF16 if half and fit_fp16_range(vae) else graphs.FULL


def _residuals(checkpoints: Checkpoints) -> tuple[specs.Residual, ...]:
    return control.residuals(checkpoints.pipeline.unet) if checkpoints.controlnets else ()


def _features(checkpoints: Checkpoints) -> tuple[specs.Residual, ...]:
    return t2i.features(checkpoints.pipeline.unet, checkpoints.family) if checkpoints.t2i_adapters else ()


def describe(bundle: BundleFile, checkpoints: Checkpoints) -> specs.Bundle:
    """Describe the checkpoints for the models inside Triton."""
    pipeline, family = checkpoints.pipeline, checkpoints.family
    unet, vae = pipeline.unet.config, pipeline.vae.config
    sample = unet.sample_size if isinstance(unet.sample_size, list | tuple) else (unet.sample_size,) * 2
    height, width = (size * pipeline.vae_scale_factor for size in sample)
    # Keep "_use_default_values", so that from_config of another scheduler class uses its own defaults for those keys.
    dropped = ("_class_name", "_diffusers_version", "_name_or_path")
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if key not in dropped}
    configs = [getattr(pipeline, model).config for model, _ in family.text_encoders]
    preview_factors, preview_offset = fit_preview(pipeline.vae, pipeline.vae_scale_factor)
    return specs.Bundle(
        name=bundle.name,
        family=family.name,
        latent_channels=vae.latent_channels,
        unet_channels=unet.in_channels,
        vae_scale_factor=pipeline.vae_scale_factor,
        vae_scaling_factor=vae.scaling_factor,
        vae_latents_mean=tuple(vae.get("latents_mean") or ()),
        vae_latents_std=tuple(vae.get("latents_std") or ()),
        preview_factors=tuple((r, g, b) for r, g, b in preview_factors),
        preview_offset=(preview_offset[0], preview_offset[1], preview_offset[2]),
        default_height=height,
        default_width=width,
        scheduler=type(pipeline.scheduler).__name__,
        scheduler_config=scheduler,
        defaults=bundle.defaults.values,
        text_encoders=tuple(
            _text_encoder(model, getattr(pipeline, model), getattr(pipeline, tokenizer))
            for model, tokenizer in family.text_encoders
        ),
        max_clip_skip=min(encoder.num_hidden_layers for encoder in configs) - int(family.penultimate),
        pooled_size=configs[-1].projection_dim if family.pooled else None,
        force_zeros_for_empty_prompt=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        time_cond_proj_dim=unet.time_cond_proj_dim,
        layers=tuple(image_prompt.cross_attention_layers(pipeline.unet)),
        transformer_per_block={"down": unet.layers_per_block, "up": unet.layers_per_block + 1},
        adapters=tuple(_adapter(adapter) for adapter in checkpoints.adapters),
        image_encoders=tuple(
            _image_encoder(name, model.config.image_size, checkpoints.feature_extractors[name])
            for name, model in checkpoints.image_encoders.items()
        ),
        face_encoder=_face_encoder(bundle),
        safety_checker=_safety_checker(pipeline),
        controlnets=tuple(
            specs.ControlNet(name=name, global_pool=net.config.global_pool_conditions)
            for name, net in checkpoints.controlnets.items()
        ),
        residuals=_residuals(checkpoints),
        t2i_adapters=tuple(
            specs.T2IAdapter(
                name=name, channels=model.config.in_channels, downscale_factor=model.config.downscale_factor
            )
            for name, model in checkpoints.t2i_adapters.items()
        ),
        features=_features(checkpoints),
        loras=tuple(checkpoints.loras),
        motion=_motion(checkpoints),
        shapes=bundle.shapes,
        sizes=export_backend(bundle.engine.backend).sizes(bundle.shapes),
        limits=bundle.limits,
        backend=bundle.engine.backend,
        precision=bundle.engine.precision,
        host=bundle.engine.host,  # type: ignore[arg-type]  # checked
        threads=bundle.engine.threads,
        devices=bundle.engine.devices,
    )


def _motion(checkpoints: Checkpoints) -> specs.Motion | None:
    model = checkpoints.motion_unet
    return None if model is None else specs.Motion(window=model.config.motion_max_seq_length)


def _text_encoder(engine: str, model: Any, tokenizer: Any) -> specs.TextEncoder:
    return specs.TextEncoder(
        engine=engine,
        max_length=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=model.config.hidden_size,
    )


def _adapter(adapter: LoadedAdapter) -> specs.Adapter:
    example = {name: torch.zeros(1, *shape) for name, shape in adapter.embeds.items()}
    with torch.no_grad():
        tokens = graphs.image_projection(adapter.name, adapter.projection, adapter.embeds).run(example)[0]
    return specs.Adapter(
        name=adapter.name,
        kind=adapter.kind,
        num_tokens=tokens.shape[1],
        image_encoder=adapter.image_encoder,
        embed_shape=adapter.embeds["image_embeds"],
        clip_shape=adapter.embeds.get("clip_embeds"),
    )


def _image_encoder(name: str, image_size: int, processor: Any) -> specs.ImageEncoder:
    size = dict(processor.size) if processor.do_resize else {}
    crop = processor.crop_size if processor.do_center_crop else None
    return specs.ImageEncoder(
        name=name,
        shortest_edge=size.get("shortest_edge"),
        resize=(size["height"], size["width"]) if size.get("height") else None,
        crop=(crop["height"], crop["width"]) if crop else None,
        resample=int(processor.resample),
        rescale_factor=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0,) * 3,
        std=tuple(processor.image_std) if processor.do_normalize else (1.0,) * 3,
        image_size=image_size,
    )


def _face_encoder(bundle: BundleFile) -> specs.FaceEncoder | None:
    section = bundle.face_encoder
    return specs.FaceEncoder(det_size=section.det_size, det_thresh=section.det_thresh) if section else None


def _safety_checker(pipeline: Any) -> specs.ImageEncoder | None:
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        return None
    return _image_encoder("safety_checker", checker.config.vision_config.image_size, pipeline.feature_extractor)
