"""Checkpoints from the Hugging Face hub or its cache, and weight files that are read without torch."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imprompt_export import BundleError
from imprompt_export.sources import flat, locate, tensors
from tiny import adapters, base, control

BUNDLE = """
name = "tiny"
base = "runwayml/base"

[[ip_adapter]]
name = "plus"
path = "h94/IP-Adapter"
subfolder = "models"
weight_name = "ip-adapter-plus_sd15.safetensors"

[[ip_adapter]]
name = "plain"
path = "h94/IP-Adapter"
subfolder = "models"
weight_name = "ip-adapter_sd15.bin"
image_encoder_folder = "models/image_encoder"

[[controlnet]]
name = "depth"
path = "lllyasviel/depth"

[[t2i_adapter]]
name = "sketch"
path = "TencentARC/sketch"

[motion_adapter]
path = "guoyww/motion"

[[lora]]
path = "latent-consistency/lora"
"""
LOAD = """
import sys
from imprompt_export import BundleError, BundleFile
from imprompt_export.checks import check_checkpoints
from imprompt_export.quiet import quiet
try:
    bundle = BundleFile.load(sys.argv[1])
    check_checkpoints(bundle)
except BundleError as error:
    print(error, "torch" in sys.modules)
    raise SystemExit(1)
with quiet():
    from imprompt_export.checkpoints import load
    made = load(bundle)
print([adapter.image_encoder for adapter in made.adapters], made.motion_unet is not None)
print(*made.image_encoders, *made.controlnets, *made.t2i_adapters)
torch = sys.modules["torch"]
torch.save(made.pipeline.unet.state_dict(), sys.argv[2])
"""
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    made = folder / "made"
    base.make_sd15(made / "base", levels=2)
    adapters.make_image_encoder(made / "ip/models/image_encoder")
    adapters.make_adapter(made / "ip", "plus", levels=2)
    adapters.make_adapter(made / "ip", "plain", weight_name="ip-adapter_sd15.bin", levels=2)
    control.make_controlnet(made / "depth", levels=2)
    control.make_t2i_adapter(made / "sketch", levels=2)
    control.make_motion_adapter(made / "motion", levels=2)
    content = load_file(control.make_lora(made / "whole"))
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    (made / "lora").mkdir()
    save_file({name: v for name, v in content.items() if name.startswith(layer)}, made / "lora/lora.safetensors")
    cache = folder / "cache"
    names = {"base": "runwayml/base", "ip": "h94/IP-Adapter", "depth": "lllyasviel/depth", "motion": "guoyww/motion"}
    names |= {"sketch": "TencentARC/sketch", "lora": "latent-consistency/lora"}
    for name, repository in names.items():
        publish(made / name, cache / f"models--{repository.replace('/', '--')}")
    return cache


def publish(folder: Path, place: Path) -> None:
    """Copy `folder` to `place` in the layout of the hub's cache.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    for part in ("blobs", "refs"):
        (place / part).mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = place / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def run(folder: Path, cache: Path, text: str = BUNDLE, **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "bundle.toml").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", **more}
    command = [sys.executable, "-c", LOAD, folder / "bundle.toml", folder / "unet.bin"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_everything_loads_from_the_cache(cache: Path, tmp_path: Path) -> None:
    """All checkpoints are given by hub id; the LoRA is fused, and no library prints anything."""
    done = run(tmp_path, cache)
    assert done.stdout.splitlines() == ["['plus', 'plus'] True", "plus depth sketch"], done.stderr
    assert done.stderr == ""
    unet = torch.load(tmp_path / "unet.bin", weights_only=True)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    snapshot = cache / "models--runwayml--base/snapshots" / COMMIT
    assert not torch.equal(unet[name], load_file(snapshot / "unet/diffusion_pytorch_model.safetensors")[name])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("models--runwayml--base", "base: .*the hub repository runwayml/base is not in .* .HF_HUB_OFFLINE is set"),
        (
            "models--h94--IP-Adapter",
            "ip_adapter plus: .*the hub repository h94/IP-Adapter is not in .* .HF_HUB_OFFLINE is set",
        ),
        ("models--lllyasviel--depth", "controlnet depth: .*the hub repository lllyasviel/depth is not in"),
        ("models--TencentARC--sketch", "t2i_adapter sketch: .*the hub repository TencentARC/sketch is not in"),
        ("models--guoyww--motion", "motion_adapter: .*the hub repository guoyww/motion is not in"),
        (
            "models--latent-consistency--lora",
            "lora latent-consistency/lora: .*the hub repository latent-consistency",
        ),
        ("models--runwayml--base/snapshots/*/unet/*.safetensors", "base: no weights in .*runwayml--base.*/unet"),
        ("models--h94--IP-Adapter/snapshots/*/models/image_encoder", "ip_adapter plus: no image encoder at .*h94--IP"),
        ("models--h94--IP-Adapter/snapshots/*/models/*.bin", "ip_adapter plain: no file .*ip-adapter_sd15.bin"),
        ("models--h94--IP-Adapter/blobs/*", "ip_adapter plus: no file .*ip-adapter-plus_sd15.safetensors"),
        (
            "models--lllyasviel--depth/snapshots/*/config.json",
            "controlnet depth: no config.json in .*--depth",
        ),
    ],
)
def test_checkpoints_missing_from_the_cache_are_named(cache: Path, tmp_path: Path, missing: str, message: str) -> None:
    """Torch is not imported. Missing blobs stand for an interrupted download, which leaves dangling links."""
    shutil.copytree(cache, tmp_path / "cache", symlinks=True)
    for path in (tmp_path / "cache").glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run(tmp_path, tmp_path / "cache")
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith(" False\n")
    assert re.match(message, done.stdout), done.stdout


@pytest.fixture
def hub(cache: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the content of the cache as a hub; return its address and the paths that were requested."""
    requested: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[0] == "api"
            owner, name, *rest = parts[2:] if api else parts
            snapshot = cache / f"models--{owner}--{name}/snapshots/{COMMIT}"
            if not snapshot.is_dir():
                self._send(404, error="RepoNotFound")
            elif api:
                files = sorted(path for path in snapshot.rglob("*") if path.is_file())
                names = [path.relative_to(snapshot).as_posix() for path in files]
                tree = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                self._send(200, json.dumps(tree if "tree" in rest else info).encode())
            elif (file := snapshot.joinpath(*rest[2:])).is_file():
                self._send(200, file.read_bytes(), etag=hashlib.sha256(file.read_bytes()).hexdigest())
            else:
                self._send(404, error="EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def _send(self, status: int, content: bytes = b"", *, etag: str = "", error: str = "") -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, "X-Error-Code": error}
            for name, value in (headers | {"ETag": f'"{etag}"' if etag else ""}).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


def test_everything_loads_from_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Afterwards everything is in the cache, so that a second run works offline."""
    done = run(tmp_path, tmp_path / "cache", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub[0])
    assert done.stdout.splitlines() == ["['plus', 'plus'] True", "plus depth sketch"], done.stderr
    assert done.stderr == ""
    assert not any("sdxl" in path for path in hub[1])
    assert run(tmp_path, tmp_path / "cache").stdout == done.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("runwayml/base", "runwayml/bsae"), "base: .* the hub has no such repository"),
        (
            ("plus_sd15", "face_sd15"),
            "ip_adapter plus: no file models/ip-adapter-face_sd15.safetensors in h94",
        ),
        (
            ("lllyasviel/depth", "guoyww/motion"),
            "controlnet depth: guoyww/motion is a motion adapter; expected a",
        ),
    ],
)
def test_checkpoints_missing_from_the_hub_are_named(
    hub: tuple[str, list[str]], tmp_path: Path, changed: tuple[str, str], message: str
) -> None:
    done = run(tmp_path, tmp_path / "cache", BUNDLE.replace(*changed), HF_HUB_OFFLINE="0", HF_ENDPOINT=hub[0])
    assert done.stdout.endswith(" False\n"), done.stderr
    assert re.match(message, done.stdout), done.stdout


def test_unreachable_hub_is_reported_at_once(tmp_path: Path) -> None:
    """The hub's own library would retry for half a minute."""
    start = time.perf_counter()
    text = BUNDLE.partition("[[")[0]
    done = run(tmp_path, tmp_path / "cache", text, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert "base: there is no folder runwayml/base next to the bundle file, and model_index.json of" in done.stdout
    assert time.perf_counter() - start < 15


def test_paths_are_not_mistaken_for_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/sd15").mkdir(parents=True)
    assert locate("base", tmp_path, "checkpoints/sd15") == str(tmp_path / "checkpoints/sd15")
    for path in ("sd15", "./a/b", "../a", "a/b/c", "/a/b", "checkpoints/sd51", "a//b", "ow ner/name", ""):
        if path:
            with pytest.raises(BundleError, match="base: no such file or folder"):
                locate("base", tmp_path, path)
    assert locate("base", tmp_path, "owner/name") == "owner/name"


def shapes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in flat(content).items()}


def test_shapes_are_read_from_pickles(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).half().state_dict()
    state |= OrderedDict(view=torch.arange(12).reshape(3, 4).t(), parameter=torch.nn.Parameter(torch.ones(2, 1)))
    torch.save({"image_proj": state, "step": 3, "note": "x"}, tmp_path / "a.bin")
    found = tensors("x", tmp_path / "a.bin")
    assert found is not None
    assert shapes(found) == shapes({"image_proj": state})


def test_old_pickles_are_left_to_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert tensors("x", tmp_path / "a.bin") is None


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("ran",))


@pytest.mark.parametrize("content", [{"a": Malicious()}, Malicious(), [torch.ones(2)]])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(BundleError, match="plain tensors"):
        tensors("x", tmp_path / "a.bin")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(Malicious())[:-1] + b"x."])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(BundleError, match=r"a\.bin is (damaged|not a file of plain tensors)"):
        tensors("x", tmp_path / "a.bin")
