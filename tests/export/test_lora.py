"""LoRAs in every format change the weights as in diffusers, and files that cannot be applied completely are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline, MotionAdapter, UNetMotionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt_export import BundleError, BundleFile, lora
from imprompt_export.backends.inductor import _save_loras
from imprompt_export.checks import check_checkpoints
from imprompt_export.graphs import Graph
from imprompt_serving.gpu.loras import LoraWeights
from tiny import adapters, base, control

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    base.make_sd15(folder / "sd15")
    base.make_sdxl(folder / "sdxl", layers_per_block=1)
    control.make_lora(folder / "sd15-lora", fmt="peft", text_encoder=True)
    control.make_lora(folder / "sdxl-lora", fmt="peft", family="sdxl", layers_per_block=1)
    return folder


def pipeline(root: Path, family: str) -> Any:
    return DiffusionPipeline.from_pretrained(root / family)


def weights(pipe: Any) -> Weights:
    """Copy the weights of the networks that a LoRA can change."""
    found: Weights = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, name, None)) is not None:
            found |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
    return found


def fused(root: Path, family: str, file: Path, scale: float = 0.7) -> Weights:
    pipe = pipeline(root, family)
    lora.fuse("lora", file, scale, pipe)
    return weights(pipe)


def by_diffusers(root: Path, family: str, file: Path, scale: float = 0.7) -> Weights:
    pipe = pipeline(root, family)
    pipe.load_lora_weights(file, adapter_name="x")
    pipe.set_adapters(["x"], [scale])
    pipe.fuse_lora(adapter_names=["x"])
    pipe.unload_lora_weights()
    return weights(pipe)


def assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5, msg=f"{name} differs")


def save(file: Path, content: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in content.items()}, file, metadata
    )
    return file


@pytest.mark.parametrize("fmt", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_fused_weights_equal_those_of_diffusers(
    root: Path, tmp_path: Path, fmt: control.LoraFormat, family: base.Family
) -> None:
    layers = 1 if family == "sdxl" else None
    file = control.make_lora(tmp_path, fmt=fmt, family=family, layers_per_block=layers, text_encoder=family == "sd15")
    ours, plain = fused(root, family, file), weights(pipeline(root, family))
    assert_equal(ours, by_diffusers(root, family, file))
    changed = {name.partition(".")[0] for name in ours if not torch.equal(ours[name], plain[name])}
    assert changed == ({"unet", "text_encoder"} if family == "sd15" else {"unet"})


def renamed(content: Weights, rename: Callable[[str], str]) -> Weights:
    return {rename(name): value for name, value in content.items()}


def ldm(name: str, layers: Mapping[str, Any]) -> str:
    """Rename a tensor of a PEFT LoRA to its name in Stability's own UNet."""
    layer, lora_part = name.removeprefix("unet.").split(".lora_")
    return f"{lora._ldm_name(layer, layers) or layer}.lora_{lora_part}"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "base_model.model.", "base_model.model.unet.", ""]
)
def test_all_prefixes_are_understood(root: Path, tmp_path: Path, family: str, prefix: str) -> None:
    file = root / f"{family}-lora/pytorch_lora_weights.safetensors"
    unet = {name: value for name, value in load_file(file).items() if name.startswith("unet.")}
    expected = fused(root, family, save(tmp_path / "a.safetensors", unet))
    other = save(tmp_path / "b.safetensors", renamed(unet, lambda name: prefix + name.removeprefix("unet.")))
    assert_equal(fused(root, family, other), expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_comfyui_names_are_understood(root: Path, tmp_path: Path, family: str) -> None:
    """Every trained layer has its own name of the form `diffusion_model.input_blocks...`."""
    layers = dict(pipeline(root, family).unet.named_modules())
    file = root / f"{family}-lora/pytorch_lora_weights.safetensors"
    unet = {name: value for name, value in load_file(file).items() if name.startswith("unet.")}
    expected = fused(root, family, save(tmp_path / "a.safetensors", unet))
    other = renamed(unet, lambda name: f"diffusion_model.{ldm(name, layers)}")
    assert len(other) == len(unet)
    assert not any("up_blocks" in name or "down_blocks" in name for name in other)
    assert_equal(fused(root, family, save(tmp_path / "b.safetensors", other)), expected)


def test_kohya_names_for_sdxl_are_mapped_as_in_diffusers(root: Path, tmp_path: Path) -> None:
    """The mapping of `input_blocks` to `down_blocks` equals that of diffusers."""
    layers = dict(pipeline(root, "sdxl").unet.named_modules())
    content = load_file(root / "sdxl-lora/pytorch_lora_weights.safetensors")

    def kohya(name: str) -> str:
        layer, _, part = ldm(name, layers).rpartition(".lora_")
        return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"

    file = save(tmp_path / "kohya.safetensors", renamed(content, kohya))
    pipe = pipeline(root, "sdxl")
    state, alphas = pipe.lora_state_dict(str(file), unet_config=pipe.unet.config)
    theirs = {name.replace(".processor", "").split(".lora")[0].split("_lora.")[0] for name in state}
    ours = {f"unet.{update.layer}" for update in lora.plan("lora", load_file(file), _targets(pipe))}
    assert {name.removesuffix(".0") for name in ours} == {name.removesuffix(".0") for name in theirs}
    assert not alphas
    assert_equal(fused(root, "sdxl", file), fused(root, "sdxl", root / "sdxl-lora/pytorch_lora_weights.safetensors"))


def _targets(pipe: Any) -> lora.Targets:
    modules = pipe.unet.named_modules()
    return {"unet": {name: tuple(m.weight.shape) for name, m in modules if getattr(m, "weight", None) is not None}}


def test_alpha_is_read_from_the_peft_configuration(root: Path, tmp_path: Path) -> None:
    content = load_file(root / "sd15-lora/pytorch_lora_weights.safetensors")
    unet = {name.removeprefix("unet."): value for name, value in content.items() if name.startswith("unet.")}
    file = save(tmp_path / "adapter_model.safetensors", renamed(unet, lambda name: f"base_model.model.{name}"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "peft_type": "LORA"}))
    plain = save(tmp_path / "plain/a.safetensors", renamed(unet, lambda name: f"unet.{name}"))
    assert_equal(fused(root, "sd15", file, 1.0), fused(root, "sd15", plain, 0.5))


def test_alpha_is_read_from_the_metadata_of_diffusers(root: Path, tmp_path: Path) -> None:
    content = load_file(root / "sd15-lora/pytorch_lora_weights.safetensors")
    unet = {name: value for name, value in content.items() if name.startswith("unet.")}
    layers = sorted({name.removeprefix("unet.").partition(".lora_")[0] for name in unet})
    settings: dict[str, Any] = {"unet.r": 4, "unet.lora_alpha": 1, "unet.target_modules": layers}
    settings["unet.alpha_pattern"] = {layers[0]: 3}
    file = save(tmp_path / "a.safetensors", unet, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    assert_equal(fused(root, "sd15", file), by_diffusers(root, "sd15", file))


def dora(root: Path, family: str, content: Weights) -> Weights:
    """Add magnitudes to a PEFT LoRA, about those of the base's weights but different in every row."""
    base_weights = weights(pipeline(root, family))
    magnitudes = {}
    for layer in (name.removesuffix(".lora_A.weight") for name in content if name.endswith(".lora_A.weight")):
        weight = base_weights[f"{layer.replace('text_model.', '')}.weight"]
        magnitude = weight.flatten(1).norm(dim=1) * torch.linspace(0.8, 1.2, len(weight))
        # transformers, which loads those of text encoders, only finds them by the longer name.
        name = f"{layer}.lora_magnitude_vector{'.weight' if layer.startswith('text') else ''}"
        magnitudes[name] = magnitude if weight.dim() == 2 else magnitude[None, :, None, None]
    return content | magnitudes


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_doras_are_applied_as_in_diffusers(root: Path, tmp_path: Path, family: str) -> None:
    """diffusers applies PEFT's DoRAs; kohya's, whose magnitudes it drops, give the same weights here."""
    content = load_file(root / f"{family}-lora/pytorch_lora_weights.safetensors")
    file = save(tmp_path / "a.safetensors", dora(root, family, content))
    ours = fused(root, family, file)
    assert_equal(ours, by_diffusers(root, family, file))
    plain = fused(root, family, save(tmp_path / "plain.safetensors", content))
    assert sum(not torch.allclose(ours[name], value) for name, value in plain.items()) == len(content) // 2
    parts = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
    kohya = {}
    for name, value in load_file(file).items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        layer = layer.replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_").replace(".", "_")
        if part == "lora_magnitude_vector":
            value = value.reshape(-1, *[1] * max(value.dim() - 1, 1))
        kohya[f"{layer}.{parts[part]}"] = value
    assert_equal(fused(root, family, save(tmp_path / "kohya.safetensors", kohya)), ours)


def test_a_dora_cannot_be_chosen_by_requests(root: Path, tmp_path: Path) -> None:
    content = load_file(root / "sdxl-lora/pytorch_lora_weights.safetensors")
    file = save(tmp_path / "dora.safetensors", dora(root, "sdxl", content))
    (tmp_path / "bundle.toml").write_text(
        f'name = "t"\nbase = "{root}/sdxl"\n[engine]\nbackend = "inductor"\n'
        f'[[lora]]\nname = "a"\npath = "{file.name}"\nfused = false\n'
    )
    said = r"is a DoRA, which requests cannot choose: fuse this one \(fused = true\)"
    with pytest.raises(BundleError, match=said):
        check_checkpoints(BundleFile.load(tmp_path / "bundle.toml"))
    with pytest.raises(BundleError, match=said):
        lora.unet_factors("lora", file, pipeline(root, "sdxl"))


def _first(content: Weights) -> str:
    return next(name.partition(".lora_down")[0] for name in content if ".lora_down" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {f"{_first(c)}.dora_scale": torch.ones(1, 48)}, r"dora_scale has the shape \[1, 48\], not one"),
        (lambda c: c | {f"{_first(c)}.lora_magnitude_vector": torch.ones(4)}, r"has the shape \[4\], not one magn"),
        (lambda c: c | {f"{_first(c)}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, r"cannot be applied: .*lora_mid"),
        (lambda c: c | {f"{_first(c)}.diff_b": torch.ones(4)}, r"cannot be applied: .*diff_b"),
        (lambda c: c | {"bundle_emb.cat.string_to_param": torch.ones(4)}, r"cannot be applied: bundle_emb"),
        (lambda c: {n.replace("lora_down", "lokr_w1"): v for n, v in c.items()}, r"is a LoKr \("),
        (lambda c: {f"{_first(c)}.hada_w1_a": torch.ones(4, 4)}, r"is a LoHa \("),
        (lambda c: {n: v for n, v in c.items() if n != f"{_first(c)}.lora_up.weight"}, "incomplete: .* no up weights"),
        (lambda c: {n.replace("lora_unet_", "lora_te2_"): v for n, v in c.items()}, "are not in the base, such as"),
        (lambda c: c | {f"lora_unet_more.{s}": torch.ones(4, 4) for s in ("lora_up.weight", "lora_down.weight")},
         "1 of its .* layers are not in the base, such as lora_unet_more"),
        (lambda c: c | {f"{_first(c)}.lora_down.weight": torch.ones(4, 5)}, "is made for weights of .* x 5, but"),
        (lambda c: c | {f"{_first(c)}.lora_up.weight": torch.ones(3, 4)}, "is made for weights of 3 x"),
        (lambda c: c | {n.replace("lora_te_", "text_encoder."): v for n, v in c.items() if "lora_te_" in n},
         "the same layers under different names"),
    ],
)  # fmt: skip
def test_partly_applicable_files_are_refused(
    root: Path, tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    """Both the check by tensor names and the fusion refuse them, and weights stay unchanged."""
    content = load_file(control.make_lora(tmp_path / "whole", text_encoder=True))
    file = save(tmp_path / "broken.safetensors", change(content))
    (tmp_path / "bundle.toml").write_text(f'name = "t"\nbase = "{root}/sd15"\n[[lora]]\npath = "broken.safetensors"\n')
    with pytest.raises(BundleError, match=rf"lora broken\.safetensors.*{message}"):
        check_checkpoints(BundleFile.load(tmp_path / "bundle.toml"))
    pipe = pipeline(root, "sd15")
    before = weights(pipe)
    with pytest.raises(BundleError, match=message):
        lora.fuse("lora", file, 1.0, pipe)
    assert_equal(weights(pipe), before)


def test_ip_adapter_is_refused_as_lora(root: Path, tmp_path: Path) -> None:
    faceid = adapters.make_adapter(tmp_path, "faceid")
    (tmp_path / "bundle.toml").write_text(f'name = "t"\nbase = "{root}/sd15"\n[[lora]]\npath = "{faceid.name}"\n')
    with pytest.raises(BundleError, match=r"is an IP-Adapter .*, not a LoRA"):
        check_checkpoints(BundleFile.load(tmp_path / "bundle.toml"))


def test_a_lora_for_requests_adds_what_a_fused_one_does(root: Path, tmp_path: Path) -> None:
    file = control.make_lora(tmp_path)
    pipe, theirs = pipeline(root, "sd15"), fused(root, "sd15", file)
    ours = weights(pipe)
    for layer, (down, up) in lora.unet_factors("lora", file, pipe).items():
        weight = ours[f"unet.{layer}.weight"]
        weight += 0.7 * (up @ down.flatten(1)).reshape(weight.shape)
    assert_equal(ours, theirs)


def test_a_lora_for_requests_must_not_change_text_encoders(root: Path, tmp_path: Path) -> None:
    """It is refused before weights are loaded, and again when they are loaded, as with a base on the hub."""
    file = control.make_lora(tmp_path, text_encoder=True)
    (tmp_path / "bundle.toml").write_text(
        f'name = "t"\nbase = "{root}/sd15"\n[engine]\nbackend = "inductor"\n'
        f'[[lora]]\nname = "a"\npath = "{file.name}"\nfused = false\n'
    )
    said = r"of its layers are in the text_encoder; .*fuse this one \(fused = true\)"
    with pytest.raises(BundleError, match=said):
        check_checkpoints(BundleFile.load(tmp_path / "bundle.toml"))
    pipe = pipeline(root, "sd15")
    with pytest.raises(BundleError, match=said):
        lora.unet_factors("lora", file, pipe)


def test_a_motion_unet_has_the_layers_of_its_unet(root: Path, tmp_path: Path) -> None:
    """So the same factors fit both networks."""
    pipe = pipeline(root, "sd15")
    motion = MotionAdapter.from_pretrained(control.make_motion_adapter(tmp_path / "motion"))
    state = UNetMotionModel.from_unet2d(pipe.unet, motion).state_dict()
    factored = lora.unet_factors("lora", control.make_lora(tmp_path), pipe)
    assert len(factored) > 100
    for layer, (down, up) in factored.items():
        assert state[f"{layer}.weight"].shape == (len(up), *down.shape[1:])


def test_sets_of_loras_replace_weights_as_diffusers_does(root: Path, tmp_path: Path) -> None:
    """Compare the weights of a served UNet after switches between sets of LoRAs with those after `set_adapters`."""
    files = {n: control.make_lora(tmp_path, weight_name=f"{n}.safetensors", seed=i) for i, n in enumerate("ab")}
    pipe, oracle = pipeline(root, "sd15"), pipeline(root, "sd15")
    graph = SimpleNamespace(
        name="unet", loras={name: lora.unet_factors(name, file, pipe) for name, file in files.items()}
    )
    served = {f"module.{name}": weight.detach() for name, weight in pipe.unet.named_parameters()}
    _save_loras(cast(Graph, graph), tmp_path / "unet.json", served)
    loaded = LoraWeights(tmp_path / "unet.json", served, lambda name: served[name].clone())
    before = weights(pipe)
    loaded.use({"a": 0.7, "b": -0.4})
    ours = weights(pipe)
    loaded.use({"b": 1.0})
    loaded.use({})
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    loaded.use({"a": 0.7, "b": -0.4})
    assert all(torch.equal(value, ours[name]) for name, value in weights(pipe).items())
    for name, file in files.items():
        oracle.load_lora_weights(file, adapter_name=name)
    oracle.set_adapters(["a", "b"], [0.7, -0.4])
    oracle.fuse_lora(adapter_names=["a", "b"])
    oracle.unload_lora_weights()
    assert_equal(ours, weights(oracle))


def test_a_lora_for_weights_that_a_network_lacks_is_refused(tmp_path: Path) -> None:
    factors = lora.Factors(torch.ones(1, 4), torch.ones(4, 1))
    graph = SimpleNamespace(name="unet", loras={"a": {"mid": factors}})
    with pytest.raises(BundleError, match="lora a: unet does not use the weights of mid"):
        _save_loras(cast(Graph, graph), tmp_path / "unet.json", ["module.conv.weight"])
