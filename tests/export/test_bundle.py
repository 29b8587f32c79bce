"""Bundle files are checked before the export, and errors name the key or checkpoint."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from imprompt_export import BundleError, BundleFile
from imprompt_export.adapters import kind_of, read
from imprompt_export.checkpoints import load
from imprompt_export.exporter import bundle_graphs, describe
from imprompt_export.repository import _IN_DENOISER
from imprompt_serving import wire
from tiny import adapters, base, control

BASE = 'name = "tiny"\nbase = "base"\n'
ADAPTER = """
[[ip_adapter]]
name = "plain"
path = "ip"
subfolder = "models"
weight_name = "ip-adapter_sd15.safetensors"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an SD1.5 base, and adapters and encoders of both families."""
    root = tmp_path_factory.mktemp("checkpoints")
    base.make_sd15(root / "base")
    for family, encoder in (("models", "vit_h"), ("sdxl_models", "big_g")):
        adapters.make_image_encoder(root / "ip" / family / "image_encoder", kind=encoder)
    for family in ("sd15", "sdxl"):
        adapters.make_adapter(root / "ip", "plain", family=family)
    adapters.make_adapter(root / "ip", "plus")
    return root


def write(folder: Path, text: str) -> Path:
    file = folder / "bundle.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "color = 3", "color"),
        (BASE + ADAPTER + "scale = 0.5", "scale"),
        (BASE + '[engine]\nbackend = "abacus"', "engine.backend: 'abacus' is not one of .*onnxruntime, "),
        (
            BASE + '[engine]\nprecision = "int8"',
            r"engine.precision \(with onnxruntime\): 'int8' is not one of fp32, fp16",
        ),
        (BASE + '[engine]\nbackend = "openvino"\nhost = "native"', "engine.host"),
        (BASE + "[engine]\nthreads = -1", "engine.threads"),
        (BASE + "[engine]\ndevices = [0, 0]", "engine.devices.*distinct"),
        (BASE + "[engine]\ndevices = [-1]", "engine.devices"),
        (BASE + '[engine]\nprecision = "fp4"', "engine.precision.*fp4.*fp32, fp16, bf16"),
        (BASE + '[engine]\nbackend = "tensorrt_rtx"\nhost = "native"', "engine.host.*tensorrt_rtx.*not one of python"),
        (BASE + "[engine]\nrefit = true", "engine.refit.*onnxruntime"),
        (BASE + '[engine]\ntargets = ["8.9"]', "engine.targets.*SM89"),
        (BASE + "[shapes]\nregions = 0", "shapes.regions"),
        (BASE + "[shapes]\nheight = [512, 64, 1024]", "shapes.height"),
        (BASE + "[shapes]\nwidth = [60, 64, 64]", "multiples of 8"),
        (BASE + "[shapes]\nrows = [1, 2]", "rows"),
        (BASE + "[shapes]\nimage_tokens = [16, 4]", "image_tokens"),
        (BASE.replace("tiny", "Tiny"), "name"),
        (BASE.replace("tiny", "up"), "name"),
        ('name = "tiny"', "base"),
        (BASE + ADAPTER + ADAPTER, "differ"),
        (BASE + ADAPTER.replace("ip-adapter_sd15", "nothing"), "nothing.safetensors"),
        (BASE + ADAPTER + 'image_encoder_folder = "elsewhere"', "elsewhere"),
        (BASE.replace('"base"', '"./nowhere"'), "nowhere"),
        ("name = ", "TOML"),
    ],
)
def test_invalid_values_are_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(BundleFile.load(write(folder, text)))


NET = '[[controlnet]]\nname = "{}"\npath = "net"\n'
LORA = '[[lora]]\npath = "lora"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + ADAPTER.replace("weight_", "weigth_"), r"ip_adapter\[0\]: .* weigth_name; did you mean weight_name\?"),
        (BASE + "[[lroa]]", "lroa; did you mean lora"),
        (BASE + "[engine]\nprecison = 1", "engine: no such key: precison; did you mean precision"),
        (BASE + 'precision = "fp16"', r"no such key: precision; it belongs in \[engine\]"),
        (BASE + LORA + 'base = "x"', r"lora\[0\]: no such key: base; it belongs at the top of the file"),
        (BASE + "xyzzy = 1", r"no such key: xyzzy; see docs/bundle\.md"),
        (BASE + 'folder = "x"', "no such key: folder"),
        (BASE + '[ip_adapter]\nname = "x"', r"ip_adapter: expected a list \(\[\[...\]\] for tables\), got a table"),
        (BASE + '[[motion_adapter]]\npath = "x"', r"motion_adapter: expected a table .* got a list"),
        (BASE + '[limits]\nimages = "3"', "limits.images: expected `int`, got `str`"),
        (BASE + '[[controlnet]]\nname = "x"', r"controlnet\[0\]\.path: this key is required"),
        (BASE + '"\\u001b[31m\\n" = 1', r"no such key: \[31m"),
        (BASE + "x = " + "[" * 5000, "is not TOML"),
        (BASE + "x = " + "9" * 5000, "is not TOML"),
        # Values
        (BASE + "[shapes]\nrows = [1, 2, " + "9" * 400 + "]", "shapes.rows: must be a number of at most"),
        (BASE + LORA + "scale = nan", "lora.scale: must be a number"),
        (BASE + LORA + "scale = -inf", "lora.scale: must be a number"),
        (BASE + LORA + "fused = false", "lora.name: lora lora is not fused and needs a name"),
        (BASE + LORA + 'fused = false\nname = "a"\nscale = 1.0', "lora.scale: lora a is not fused; requests choose"),
        (BASE + LORA + 'fused = false\nname = "a"', "lora.fused: .*onnxruntime.* cannot change weights.*inductor"),
        (
            BASE + LORA + 'fused = false\nname = "a"\n[engine]\nbackend = "inductor"\nprecision = "fp8"\n',
            "lora.fused: weights in fp8 cannot change",
        ),
        (BASE + 2 * (LORA + 'name = "a"\n'), "lora.name: names must differ, got a, a"),
        (BASE + "[engine]\nmin_snr_db = nan", "engine.min_snr_db: must be a number"),
        *((BASE + f"[limits]\n{key} = 0", f"limits.{key}: must be (at least 1|above 0), got 0") for key in (
            "prompt_characters", "json_characters", "images", "image_megapixels", "image_aspect_ratio", "sample_steps",
            "train_timesteps", "timeout_seconds",
        )),
        *((BASE + f"[limits]\n{key} = -1", f"limits.{key}: must be at least 0, got -1") for key in (
            "waiting_rows", "waiting_seconds",
        )),
        *((BASE + f"[limits]\n{key} = {value}", f"limits.{key}: must be a number of") for value in ("nan", "inf")
          for key in ("waiting_seconds", "image_megapixels", "image_aspect_ratio", "timeout_seconds")),
        (BASE + "[limits]\nimage_aspect_ratio = 0.5", "limits.image_aspect_ratio: must be at least 1"),
        # Names
        (BASE.replace("tiny", "a" * 65), "at most 64 characters"),
        (BASE.replace("tiny", "a" * 30000), "name: 'aaa"),
        (BASE + NET.format("x") + NET.format("embedding_x"), "two networks would be called controlnet_embedding_x"),
    ],
)  # fmt: skip
def test_error_messages_are_one_helpful_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message) as refused:
        BundleFile.load(write(folder, text))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value).encode()) < 1000


def test_smallest_limits_are_accepted(folder: Path) -> None:
    limits = BundleFile.load(
        write(folder, BASE + "[limits]\nwaiting_rows = 0\nwaiting_seconds = 0\nimage_megapixels = 0.1\nimages = 1")
    ).limits
    assert (limits.waiting_rows, limits.waiting_seconds, limits.image_megapixels, limits.images) == (0, 0, 0.1, 1)


def test_missing_bundle_file_is_refused() -> None:
    with pytest.raises(BundleError, match=r"nowhere\.toml"):
        BundleFile.load("nowhere.toml")


def test_adapter_of_another_family_is_refused_with_both_widths(folder: Path) -> None:
    text = BASE + ADAPTER.replace("models", "sdxl_models").replace("ip-adapter_sd15", "ip-adapter_sdxl")
    with pytest.raises(BundleError, match=r"17 attention layers of width 128.*10 of width 48"):
        load(BundleFile.load(write(folder, text)))


def test_adapter_with_wrong_encoder_is_refused_with_both_widths(folder: Path) -> None:
    text = BASE + ADAPTER + 'image_encoder_folder = "sdxl_models/image_encoder"'
    with pytest.raises(BundleError, match=r"width 64.*produces 80.*ViT-H"):
        load(BundleFile.load(write(folder, text)))


def test_bin_file_that_would_run_code_is_refused(folder: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"image_proj": Malicious(), "ip_adapter": {}}, folder / "ip/models/bad.bin")
    with pytest.raises(BundleError, match="plain tensors"):
        read(folder / "ip/models/bad.bin")


def test_bin_and_safetensors_files_hold_the_same_weights(folder: Path) -> None:
    first = read(adapters.make_adapter(folder / "two", "plus", weight_name="a.bin"))
    second = read(adapters.make_adapter(folder / "two", "plus", weight_name="a.safetensors"))
    assert kind_of(first, "a") == kind_of(second, "a") == "plus"
    for part in first:
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])


def test_predicted_names_match_the_exported_models(folder: Path) -> None:
    """`BundleFile.models` and `denoiser_engines` predict names before anything is loaded."""
    control.make_controlnet(folder / "net")
    control.make_t2i_adapter(folder / "sketch")
    sections = NET.format("depth") + NET.format("canny") + '[[t2i_adapter]]\nname = "sketch"\npath = "sketch"\n'
    bundle = BundleFile.load(write(folder, BASE + ADAPTER + sections + "[engine]\ndevices = [0, 2]\n"))
    checkpoints = load(bundle)
    graphs, spec = bundle_graphs(bundle, checkpoints), describe(bundle, checkpoints)
    names = [graph.name for graph in graphs]
    in_denoiser = {name for name in names if name.startswith(_IN_DENOISER)}
    assert in_denoiser == set(bundle.denoiser_engines()) - {"motion_unet"}
    models = {spec.name, spec.model("stream"), *spec.denoisers, *(spec.model(n) for n in names if n not in in_denoiser)}
    assert models == set(bundle.models()) - {
        spec.model(part) for part in ("denoiser", "text_encoder_2", "safety_checker", "face_encoder")
    }
    for tensors in (
        *([t.name for t in graph.inputs] + list(graph.outputs) for graph in graphs),
        [tensor.name for tensor in wire.request_tensors(spec, stream=True)],
        [tensor.name for tensor in wire.response_tensors(spec, stream=True)],
        [tensor.name for tensor in wire.job_tensors(spec)],
    ):
        assert len(set(tensors)) == len(tensors)


NAMES = ("a", "a_0", "a_0_1", "negative_a", "embeds_a", "adapter", "image", "masks", "scale", "embedding", "mask_a")


def test_tensor_names_never_collide(folder: Path) -> None:
    """Use names of adapters and ControlNets that look like parts of tensor names."""
    control.make_controlnet(folder / "net")
    bundle = BundleFile.load(write(folder, BASE + ADAPTER + NET.format("net")))
    checkpoints = load(bundle)
    spec = describe(bundle, checkpoints)
    spec = msgspec.structs.replace(
        spec,
        adapters=tuple(msgspec.structs.replace(spec.adapters[0], name=name, clip_shape=(1,)) for name in NAMES),
        controlnets=tuple(msgspec.structs.replace(spec.controlnets[0], name=name) for name in NAMES),
    )
    for tables in (
        wire.request_tensors(spec, stream=True), wire.response_tensors(spec, stream=True), wire.job_tensors(spec)
    ):  # fmt: skip
        names = [tensor.name for tensor in tables]
        assert len(set(names)) == len(names)
    inputs = [
        f"ip_{part}_{name}" for name in NAMES for part in ("tokens", "bias", "scale")
    ] + [f"ip_mask_{name}_{level}" for name in NAMES for level in spec.levels]  # fmt: skip
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("plain", "plain"),
        ("light", "plain"),
        ("plus", "plus"),
        ("plus_face", "plus"),
        ("full_face", "full_face"),
        ("faceid", "faceid"),
        ("faceid_portrait", "faceid"),
        ("faceid_plus", "faceid_plus"),
        ("faceid_plusv2", "faceid_plusv2"),
    ],
)
def test_adapter_kinds_are_recognized(tmp_path: Path, kind: adapters.Kind, found: str) -> None:
    file = adapters.make_adapter(tmp_path, kind)
    assert kind_of(read(file), file.name) == found
