"""The documentation matches the code: snippets run, tables are current, and links and anchors exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

import bundles
import imprompt
from imprompt_export.bundle import BundleFile
from imprompt_serving import protocol_table
from served import Served
from tiny import images
from tiny.faces import people

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "demo").rglob("*.md")])
GUIDE = ("guide", "prompts", "image-prompts", "faces", "control", "client")
"""The pages for callers in Python, in reading order."""
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SERVING = ROOT / "model_repository/imprompt_serving"
MODULE_FOLDERS = {
    "Pipeline": SERVING / "pipeline",
    "Denoiser": SERVING / "denoiser",
    "Backends": SERVING / "backends",
    "Gateway": ROOT / "gateway/imprompt_gateway",
}
"""Sections of the architecture page that list modules."""

PICTURES = (
    *("statue", "flowers", "vermeer", "river", "girl", "gummy", "einstein", "woman", "painting", "noise"),
    *(f"style-{number}" for number in range(10)),
)
MASKS = {"mask": "circle", "left": "left", "right": "right"}


class EveryServer:
    """A client that sends each call to the server of its bundle; the guide assumes one server for all bundles."""

    def __init__(self, served: Any) -> None:
        self._served = served

    def __enter__(self) -> EveryServer:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the servers running."""

    def generate(self, *, model: str, **arguments: Any) -> Any:
        return self._served(model).client.generate(model=model, **arguments)

    def encode_prompt(self, model: str, prompt: str, **arguments: Any) -> Any:
        return self._served(model).client.encode_prompt(model, prompt, **arguments)

    def stream(self, *, model: str, **arguments: Any) -> Any:
        return self._served(model).client.stream(model=model, **arguments)

    def encode_image(self, model: str, adapter: str, images: Any) -> Any:
        return self._served(model).client.encode_image(model, adapter, images)

    def describe(self, model: str) -> Any:
        return self._served(model).client.describe(model)

    def models(self) -> Any:
        return self._served("sd15").client.models()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the files that the pages name, in a new working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(PICTURES):
        images.photo(seed, size=(64, 64)).save(f"{name}.png")
    for kind in ("depth", "canny"):
        images.control_image(kind).save(f"{kind}.png")
    for name, kind in MASKS.items():
        images.mask(kind).save(f"{name}.png")
    for seed, name in enumerate(("selfie", "selfie-2")):
        people((0.5, 0.5, 0.3), seed=seed).save(f"{name}.png")
    np.save("face-embedding.npy", images.face_embeds(1)[1, 0].numpy())


def run(page: str, names: dict[str, Any]) -> int:
    """Run the page's snippets in order, as a reader would; return how many there are."""
    text = (ROOT / page).read_text(encoding="utf-8")
    # Snippets that search pictures for faces need an extra; tests/gateway runs those of the `openai` package.
    snippets = [
        match
        for match in SNIPPET.finditer(text)
        if (bundles.FACES or "selfie" not in match[1]) and "import OpenAI" not in match[1]
    ]
    for match in snippets:
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(ROOT / page), "exec"), names)
    return len(snippets)


@pytest.mark.usefixtures("pictures")
def test_guide_runs(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = imprompt.AsyncClient
    monkeypatch.setattr(imprompt, "Client", lambda url, **options: EveryServer(served))
    monkeypatch.setattr(imprompt, "AsyncClient", lambda url: connect(served("sd15").server.grpc_address))
    names: dict[str, Any] = {}
    assert sum(run(f"docs/{page}.md", names) for page in GUIDE) >= 20
    assert Path("bear.png").is_file()
    assert Path("garden-1.png").is_file()
    assert len(names["winter"].images) == 1


@pytest.mark.usefixtures("pictures")
def test_readme_runs(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imprompt, "Client", lambda url: EveryServer(served))
    assert run("README.md", {}) == 1
    assert Path("garden.png").is_file()


@pytest.mark.usefixtures("pictures")
def test_raw_client_of_the_protocol_page_runs(sd15: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = tritonclient.grpc.InferenceServerClient
    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", lambda url: connect(sd15.server.grpc_address))
    names: dict[str, Any] = {}
    assert run("docs/protocol.md", names) == 1
    expected = sd15.generate(
        prompt="a polar bear sitting in a chair",
        ip_adapter_image={"plain": "statue.png"},
        ip_adapter_scale=0.6,
        num_inference_steps=4,
        seed=0,
    )
    np.testing.assert_array_equal(names["pictures"][0], np.asarray(expected.images[0]))


def _ask(sd15: Served, body: object) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://{sd15.server.http_address}/v2/models/sd15/infer", json.dumps(body).encode(), method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.usefixtures("pictures")
def test_shell_commands_of_the_protocol_page_run(sd15: Served) -> None:
    """All calls by HTTP work as written, and the pictures are those of the Python client."""
    if missing := [name for name in ("bash", "curl", "jq") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    page = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    commands = [command for command in SHELL.findall(page) if "curl " in command and "grpcurl" not in command]
    outputs = []
    for command in commands:
        script = "set -euo pipefail\n" + command.replace("localhost:8000", str(sd15.server.http_address))
        environment = os.environ | {"no_proxy": "127.0.0.1"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs == ["", "", "", "".join(f"step {step} of 10\n" for step in range(1, 11)) + "done\n"]
    bear = {"prompt": "a polar bear sitting in a chair", "ip_adapter_image": {"plain": "statue.png"}}
    winter = {"prompt": "a garden in winter", "image": "flowers.png", "strength": 0.5}
    for file, request in (("bear.png", bear), ("winter.webp", winter), ("polar.png", {"prompt": "a polar bear"})):
        expected = sd15.generate(**request, seed=0, output_format=Path(file).suffix[1:])
        assert expected.encoded == [Path(file).read_bytes()]


@pytest.mark.parametrize(
    ("name", "datatype", "value", "status"),
    [("strength", "FP64", 0.5, 400), ("timeout", "FP64", 0.001, 400)],
)
def test_http_status_of_errors(sd15: Served, name: str, datatype: str, value: float, status: int) -> None:
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a polar bear"]},
        {"name": name, "datatype": datatype, "shape": [1], "data": [value]},
    ]
    got, answer = _ask(sd15, {"inputs": inputs})
    assert name in answer["error"]
    assert got == status


def test_tables_of_the_protocol_page_are_current() -> None:
    page = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    assert protocol_table.filled(page) == page, "run: python -m imprompt_serving.protocol_table docs/protocol.md"
    assert set(re.findall(r"<!-- tensors: (\w+) -->", page)) == protocol_table.tables().keys()


def test_stale_table_would_be_noticed() -> None:
    page = "<!-- tensors: STREAM_REQUEST -->\n| old |\n<!-- end -->\nrest"
    fresh = protocol_table.filled(page)
    assert "| `progress_every` | INT32 | [1] |" in fresh
    assert "old" not in fresh
    assert fresh.endswith("<!-- end -->\nrest")


def test_bundle_page_lists_exactly_the_keys_of_a_bundle_file() -> None:
    page = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    assert rows == set(_keys(BundleFile)) - {"folder"}


def _keys(struct: Any, prefix: str = "") -> list[str]:
    import msgspec

    keys = []
    for field in msgspec.structs.fields(struct):
        name = prefix + field.encode_name
        nested = [t for t in (field.type, *getattr(field.type, "__args__", ())) if isinstance(t, type)]
        inner = next((t for t in nested if issubclass(t, msgspec.Struct)), None)
        keys += _keys(inner, f"{name}.") if inner else [name]
    return keys


def without_code(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that code hosts and the site make of the headings of a page."""
    titles = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in HEADING.findall(without_code(page)))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Return the link targets of a page that do not exist: files, images, and anchors."""
    broken = []
    for target in LINK.findall(without_code(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_exist(page: Path) -> None:
    assert not broken_links(page)


def test_broken_link_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n## Faults of `x` 2.51\n\n[a](#faults-of-x-251) [b](page.md#a-page) [c](#nope) ![d](nope.png)\n"
        "```\n# not a heading\n[e](nope.md)\n```\n[f](page.md#not-a-heading) [g](https://example.com/nope)\n"
    )
    assert broken_links(page) == ["#nope", "nope.png", "page.md#not-a-heading"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    listed = [page for section in navigation for pages in section.values() for page in _as_list(pages)]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def _as_list(pages: str | list[str]) -> list[str]:
    return [pages] if isinstance(pages, str) else pages


@pytest.mark.parametrize("section", MODULE_FOLDERS)
def test_architecture_lists_every_module(section: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.search(rf"^### {section}\n(.*?)^##", page, re.DOTALL | re.MULTILINE)
    assert table is not None
    listed = re.findall(r"^\| `(\w+\.py)` \|", table[1], re.MULTILINE)
    folder = MODULE_FOLDERS[section]
    assert set(listed) - {"__init__.py"} == {file.name for file in folder.glob("*.py")} - {"__init__.py"}
