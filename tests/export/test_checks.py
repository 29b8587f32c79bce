"""Missing, damaged, wrong, or mismatched checkpoints are refused in one line, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from imprompt_export import BundleError, BundleFile, checks
from tiny import adapters, base, control

BASE = 'name = "tiny"\nbase = "base"\n'
IP = "ip/models/ip-adapter_sd15.safetensors"
ENCODER, NO_ENCODER = "ip/models/image_encoder", "image_encoder_folder = false"
CONTROLNET_FILE = "depth/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make one checkpoint of every kind for SD1.5, some for SDXL, and some that are damaged."""
    folder = tmp_path_factory.mktemp("checks")
    base.make_sd15(folder / "base")
    base.make_sdxl(folder / "xl", layers_per_block=1)
    for family, encoder in (("models", "vit_h"), ("sdxl_models", "big_g")):
        adapters.make_image_encoder(folder / "ip" / family / "image_encoder", kind=encoder)
    for kind in ("plain", "plus", "faceid_plus"):
        adapters.make_adapter(folder / "ip", kind)
    adapters.make_adapter(folder / "ip", "plain", weight_name="ip-adapter_sd15.bin", subfolder="bin")
    adapters.make_adapter(folder / "ip", "plain", family="sdxl")
    control.make_controlnet(folder / "depth")
    control.make_controlnet(folder / "xldepth", family="sdxl", layers_per_block=1)
    control.make_t2i_adapter(folder / "sketch")
    control.make_motion_adapter(folder / "motion")
    control.make_motion_adapter(folder / "motion2", levels=2)
    control.make_lora(folder / "lora", weight_name="a.safetensors")
    for name in ("a", "b"):
        (folder / "two").mkdir(exist_ok=True)
        shutil.copyfile(folder / "lora/a.safetensors", folder / f"two/{name}.safetensors")
    for name in ("empty", "no_weights", "no_json"):
        (folder / name).mkdir()
    shutil.copyfile(folder / "depth/config.json", folder / "no_weights/config.json")
    shutil.copytree(folder / "depth", folder / "only_fp16")
    weights = folder / "only_fp16/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    shutil.copytree(folder / "depth", folder / "odd_name")
    weights = folder / "odd_name/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("weights.safetensors"))
    (folder / "no_json/config.json").write_text("{")
    shutil.copytree(folder / "base", folder / "odd")
    odd = json.loads((folder / "odd/unet/config.json").read_text()) | {"layers_per_block": "two"}
    (folder / "odd/unet/config.json").write_text(json.dumps(odd))
    for name, change in (("base", "unet"), ("depth", "")):
        shutil.copytree(folder / name, folder / f"cut_{name}")
        _cut(folder / f"cut_{name}" / change / "diffusion_pytorch_model.safetensors")
    for part in ("vae", "text_encoder"):
        shutil.copytree(folder / "base", folder / f"no_{part}")
        shutil.rmtree(folder / f"no_{part}" / part)
    for file in ("cut.safetensors", "cut.bin"):
        source = next(folder.glob(f"ip/{'bin' if file.endswith('bin') else 'models'}/*{Path(file).suffix}"))
        shutil.copyfile(source, folder / file)
        _cut(folder / file)
    (folder / "page.safetensors").write_text("<!doctype html>" * 30)
    save_file({k: v for k, v in load_file(folder / IP).items() if "image_proj" not in k}, folder / "half.safetensors")
    return folder


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def adapter(path: str, more: str = "") -> str:
    return f'{BASE}[[ip_adapter]]\nname = "a"\npath = "{path}"\n{more}\n'


def net(kind: str, path: str) -> str:
    heads = {"controlnet": '[[controlnet]]\nname = "n"', "t2i_adapter": '[[t2i_adapter]]\nname = "n"'}
    return f'{BASE}{heads.get(kind, f"[{kind}]")}\npath = "{path}"\n'


def lora(path: str, more: str = "") -> str:
    return f'{BASE}[[lora]]\npath = "{path}"\n{more}\n'


def check(root: Path, text: str) -> None:
    file = root / "bundle.toml"
    file.write_text(text)
    checks.check_checkpoints(BundleFile.load(file))


@pytest.mark.parametrize(
    "text",
    [
        adapter(IP),
        adapter(IP, 'weight_name = "ip-adapter_sd15.safetensors"'),
        adapter("ip/bin/ip-adapter_sd15.bin", 'image_encoder_folder = "../models/image_encoder"'),
        adapter(IP, NO_ENCODER),
        adapter("ip/models/ip-adapter-plus_sd15.safetensors", NO_ENCODER),
        adapter("ip/bin", 'image_encoder_folder = "../models/image_encoder"'),
        adapter("ip", 'subfolder = "bin"\nimage_encoder_folder = "models/image_encoder"'),
        lora("two", 'weight_name = "b.safetensors"'),
        net("controlnet", "depth"),
        net("controlnet", CONTROLNET_FILE),
        net("controlnet", "only_fp16") + 'variant = "fp16"',
        net("t2i_adapter", "sketch"),
        net("motion_adapter", "motion"),
    ],
)
def test_matching_checkpoints_pass(root: Path, text: str) -> None:
    """Paths may be folders or files, and a folder's only weight file needs no name."""
    check(root, text)


KINDS = {
    "depth": "a ControlNet",
    "motion": "a motion adapter",
    "sketch": "a T2I-Adapter",
    "lora": ".*a LoRA",
    "ip/models": ".*an IP-Adapter",
    "base": "a diffusers pipeline",
    "base/unet": "a UNet",
    "base/vae": "a VAE",
    "empty": "an empty folder",
    ENCODER: "a CLIP image encoder",
}
EXPECTED = {"controlnet": "a ControlNet", "t2i_adapter": "a T2I-Adapter", "motion_adapter": "a motion adapter"}


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize("section", EXPECTED)
def test_wrong_kind_of_network_is_refused(root: Path, section: str, path: str) -> None:
    if KINDS[path] != EXPECTED[section]:
        refused(root, net(section, path), f"{section}.*: .* is {KINDS[path]}.*; expected {EXPECTED[section]}")


@pytest.mark.parametrize("path", sorted({*KINDS} - {"base"}))
def test_wrong_kind_of_base_is_refused(root: Path, path: str) -> None:
    refused(root, BASE.replace('"base"', f'"{path}"'), f"base: .* as a diffusers pipeline: it is {KINDS[path]}")


@pytest.mark.parametrize(
    ("path", "kind"), [(IP, "is an IP-Adapter; expected a ch"), ("bundle.toml", "is not a weight")]
)
def test_wrong_kind_of_file_is_refused_as_base(root: Path, path: str, kind: str) -> None:
    refused(root, BASE.replace('"base"', f'"{path}"'), f"base: .*{kind}")


@pytest.mark.parametrize("path", ["depth", "motion", "sketch", "lora", "base/unet", ENCODER])
def test_wrong_kind_of_ip_adapter_is_refused(root: Path, path: str) -> None:
    kind = KINDS[path].removeprefix(".*")
    refused(root, adapter(path, NO_ENCODER), f"ip_adapter a: .* is not an IP-Adapter: it is {kind}")


@pytest.mark.parametrize("path", ["depth", "motion", "sketch", "base/unet", "base/vae", ENCODER, IP])
def test_wrong_kind_of_lora_is_refused(root: Path, path: str) -> None:
    refused(root, lora(path), f"lora {path} is {KINDS.get(path, 'an IP-Adapter')} .*, not a LoRA")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (adapter(IP, 'image_encoder_folder = "../../depth"'), "depth is a ControlNet; expected a CLIP image encoder"),
        # Damaged or incomplete
        (adapter("cut.safetensors", NO_ENCODER), r"cut\.safetensors is damaged"),
        (adapter("cut.bin", NO_ENCODER), r"cut\.bin is damaged"),
        (adapter("page.safetensors", NO_ENCODER), "is damaged or not a safetensors file"),
        (adapter("half.safetensors", NO_ENCODER), "it has no image_proj weights"),
        (adapter("depth/config.json", NO_ENCODER), "is not a weight file"),
        (lora("cut.safetensors"), r"cut\.safetensors is damaged"),
        (net("controlnet", "cut_depth"), r"controlnet n: .*cut_depth.* is damaged"),
        (net("controlnet", "no_weights"), "controlnet n: no weights in .*no_weights"),
        (net("controlnet", "only_fp16"), r"no weights in .*only_fp16; it has those of variant = \"fp16\""),
        (net("controlnet", "depth") + 'variant = "fp16"', r"no weights of the variant \"fp16\" in .*depth"),
        (net("controlnet", "odd_name"), r"no weights in .*odd_name; weights\.safetensors is not a name that diffusers"),
        (net("controlnet", "no_json"), r"controlnet n: .*config\.json is not JSON"),
        (BASE.replace('"base"', '"cut_base"'), r"base: .*unet.* is damaged"),
        (BASE.replace('"base"', '"odd"'), "cannot read a configuration of the checkpoints"),
        (BASE.replace('"base"', '"no_vae"'), "base: no folder vae in .*no_vae"),
        (BASE.replace('"base"', '"no_text_encoder"'), "base: no folder text_encoder"),
        # Made for another base
        (
            adapter("ip/ip-adapter-faceid-plus_sd15.bin", NO_ENCODER),
            "needs an image encoder besides the face embedding",
        ),
        (adapter("ip/sdxl_models"), "made for 17 attention layers of width 128, but the base has 10 of width 48"),
        (adapter(IP, 'image_encoder_folder = "../sdxl_models/image_encoder"'), "of width 64, but .* produces 80"),
        (net("controlnet", "xldepth"), "controlnet n: its cross_attention_dim is 128, but the base needs 48"),
        (net("motion_adapter", "motion2"), "motion_adapter: motion2 does not fit the base"),
        (net("motion_adapter", "motion").replace('"base"', '"xl"'), r"clips are only supported for SD1\.5 bases"),
        (net("t2i_adapter", "sketch").replace('"base"', '"xl"'), "t2i_adapter n: .* it is made for another family"),
        (lora("lora").replace('"base"', '"xl"'), "are not in the base|is made for another family"),
        # Ambiguous or misspelled
        (lora("two"), r"lora two: .* files \(a\.safetensors, b\.safetensors\); choose one in weight_name"),
        (adapter("ip", 'subfolder = "models"'), r"\(ip-adapter-plus_sd15\.safetensors, ip-adapter_sd15\.safe"),
        (adapter(IP, 'weight_name = "other.safetensors"'), "is already a file"),
        (adapter("ip/models", 'weight_name = "ip-adapter_sd15.safetensor"'), r"mean ip-adapter_sd15\.safetensors"),
        (adapter("ip", 'subfolder = "modles"'), "no folder .*modles; did you mean models"),
        (net("controlnet", "dpeth"), "controlnet n: no such file or folder .*: dpeth; did you mean depth"),
        (lora("lora", 'subfolder = "x"'), "no folder .*x"),
    ],
)
def test_bad_checkpoints_are_refused(root: Path, text: str, message: str) -> None:
    refused(root, text, message)


def refused(root: Path, text: str, message: str) -> None:
    """Check that the bundle is refused with one short line that matches `message`."""
    with pytest.raises(BundleError, match=message) as raised:
        check(root, text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).encode()) < 1000


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layers", [1, 2])
def test_attention_layers_are_counted_as_in_diffusers(family: base.Family, layers: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet_config(family, layers))
    expected = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    assert checks.cross_attention_layers(json.loads(unet.to_json_string())) == expected


def test_missing_configuration_keys_have_the_defaults_of_diffusers() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    assert checks.cross_attention_layers({}) == sum(n.endswith("attn2.processor") for n in unet.attn_processors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "color = 3", "color"),
        (net("controlnet", "motion"), "is a motion adapter"),
        (adapter("ip/sdxl_models"), "width 128"),
        (adapter("cut.bin", NO_ENCODER), "damaged"),
        (lora("two"), "weight_name"),
        (BASE + '[engine]\nbackend = "tensorrt"', 'pip install "imprompt[gpu]"'),
    ],
)
def test_mistakes_are_reported_without_importing_torch(root: Path, text: str, message: str) -> None:
    (root / "bundle.toml").write_text(text)
    code = (
        "import sys; from imprompt.cli import app\n"
        "try: app(['export', sys.argv[1], '-o', sys.argv[2]])\n"
        "finally: print([m for m in ('torch', 'diffusers', 'transformers', 'onnx') if m in sys.modules])"
    )
    if "tensorrt" in text and find_spec("tensorrt"):
        pytest.skip("TensorRT is installed")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, root / "bundle.toml", root / "repository"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.perf_counter() - start < 10  # allows for a busy machine; an idle one takes 0.5 s
    assert done.returncode == 1
    assert done.stdout.strip() == "[]"
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (root / "repository").exists()


@pytest.mark.parametrize("existing", ["file", "other bundle"])
def test_unusable_repository_is_refused_before_importing_torch(root: Path, tmp_path: Path, existing: str) -> None:
    (root / "bundle.toml").write_text(BASE)
    repository = tmp_path / "repository"
    if existing == "file":
        repository.write_text("mine")
    else:
        (repository / "tiny_stream/1").mkdir(parents=True)
        (repository / "tiny_stream/1/owner").write_text("tiny_stream\n")
    code = (
        "import sys; from imprompt_export import export\n"
        "try: export(*sys.argv[1:3])\n"
        "except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, root / "bundle.toml", repository]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    message, torch_imported = done.stdout.splitlines()
    assert torch_imported == "False"
    assert ("is a file" if existing == "file" else "belongs to bundle tiny_stream") in message


def test_missing_package_is_reported_after_the_bundle_is_checked(root: Path, tmp_path: Path) -> None:
    (root / "bundle.toml").write_text(BASE)
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from imprompt.cli import app; app(['export', sys.argv[1], '-o', sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, root / "bundle.toml", tmp_path / "repository"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'This command needs more packages: pip install "imprompt[export]"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "repository").exists()
