"""Textual inversion embeddings give the token ids and vectors of diffusers; those that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from imprompt_export import BundleError, BundleFile
from imprompt_export.base import load_base
from imprompt_export.checks import check_checkpoints
from imprompt_serving.pipeline.embedding_tokens import EmbeddingTokens
from tiny import base, control, embeddings

PROMPTS = (
    "a photo of <toy> in the rain",
    "<toy>, <TOY>, <toy>",
    "a photo of a cat",
    "<toy>_1 and <toy>_3",
    "EasyNegative, easynegative, uneasynegatives",
    " ".join(["a cat"] * 40) + " <toy>",
    "",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    base.make_sd15(folder / "sd15", levels=2)
    base.make_sdxl(folder / "sdxl", layers_per_block=1)
    embeddings.make_embedding(folder / "diffusers")
    embeddings.make_embedding(folder / "one", vectors=1)
    embeddings.make_embedding(folder, layout="a1111")
    embeddings.make_embedding(folder, layout="emb_params", weight_name="unnamed.safetensors")
    embeddings.make_embedding(folder, layout="sdxl", weight_name="sdxl.safetensors")
    embeddings.make_embedding(folder, width=64, weight_name="wide.safetensors")
    control.make_lora(folder / "lora", levels=2)
    return folder


def bundle(root: Path, section: str, family: str = "sd15") -> BundleFile:
    text = f'name = "tiny"\nbase = "{family}"\n[[textual_inversion]]\n{section}\n'
    (root / "bundle.toml").write_text(text)
    made = BundleFile.load(root / "bundle.toml")
    check_checkpoints(made)
    return made


def by_diffusers(root: Path, *arguments: Any, **more: Any) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd15")
    pipe.load_textual_inversion(*arguments, **more)
    return pipe


def assert_same_text(ours: Any, theirs: Any, folder: Path, number: str = "") -> None:
    """Compare the vectors of all tokens, and the tokens of prompts as the pipeline inside Triton finds them."""
    encoder, tokenizer = f"text_encoder{number}", f"tokenizer{number}"
    vectors = [getattr(pipe, encoder).get_input_embeddings().weight for pipe in (ours, theirs)]
    assert torch.equal(*vectors)
    getattr(ours, tokenizer).backend_tokenizer.save(str(folder / f"{encoder}.tokenizer.json"))
    oracle = getattr(theirs, tokenizer)
    served = Tokenizer.from_file(str(folder / f"{encoder}.tokenizer.json"))
    for prompt in PROMPTS:
        expanded = EmbeddingTokens(served).expand(prompt)
        assert expanded == theirs.maybe_convert_prompt(prompt, oracle)
        assert served.encode(expanded).ids == oracle(expanded).input_ids


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ('path = "diffusers"', {}),
        ('path = "one"', {}),
        ('path = "diffusers"\ntoken = "<other>"', {"token": "<other>"}),
        ('path = "diffusers"\ntoken = "EasyNegative"', {"token": "EasyNegative"}),
        ('path = "embedding.pt"', {"weight_name": "embedding.pt"}),
        ('path = "unnamed.safetensors"\ntoken = "<toy>"', {"weight_name": "unnamed.safetensors", "token": "<toy>"}),
    ],
)
def test_every_layout_is_loaded_as_in_diffusers(
    root: Path, tmp_path: Path, section: str, arguments: dict[str, Any]
) -> None:
    path = section.split('"')[1]
    theirs = by_diffusers(root, str(root if arguments.get("weight_name") else root / path), **arguments)
    assert_same_text(load_base(bundle(root, section)), theirs, tmp_path)


def test_a_token_for_each_vector(root: Path, tmp_path: Path) -> None:
    tokens = ["<toy>", "<b>", "<c>"]
    embedding = load_file(root / "unnamed.safetensors")["emb_params"]
    ours = load_base(bundle(root, f'path = "unnamed.safetensors"\ntoken = {tokens}'))
    assert_same_text(ours, by_diffusers(root, embedding, token=tokens), tmp_path)


def test_both_text_encoders_of_sdxl(root: Path, tmp_path: Path) -> None:
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(root / "sdxl")
    content = load_file(root / "sdxl.safetensors")
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        model, tokenizer = getattr(theirs, f"text_encoder{number}"), getattr(theirs, f"tokenizer{number}")
        theirs.load_textual_inversion(content[key], token="<toy>", text_encoder=model, tokenizer=tokenizer)
    ours = load_base(bundle(root, 'path = "sdxl.safetensors"\ntoken = "<toy>"', "sdxl"))
    assert_same_text(ours, theirs, tmp_path)
    assert_same_text(ours, theirs, tmp_path, "_2")


def test_several_embeddings(root: Path, tmp_path: Path) -> None:
    second = '[[textual_inversion]]\npath = "embedding.pt"\ntoken = "<b>"'
    theirs = by_diffusers(root, str(root / "diffusers"))
    theirs.load_textual_inversion(str(root), weight_name="embedding.pt", token="<b>")
    assert_same_text(load_base(bundle(root, f'path = "diffusers"\n{second}')), theirs, tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('path = "unnamed.safetensors"', "the file names no token; set token to the word that prompts will use"),
        ('path = "wide.safetensors"', r"its embedding has the shape \[3, 64\], but the text_encoder .* width 48"),
        ('path = "sdxl.safetensors"\ntoken = "a"', "an embedding for text_encoder_2, which the base lacks"),
        ('path = "diffusers"\ntoken = ["a", "b"]', "token has 2 words for 3 vectors; name one, or one per vector"),
        ('path = "lora"', "lora is a LoRA, not a textual inversion embedding"),
        ('path = "difusers"', "no such file or folder .*; did you mean diffusers"),
        ('path = "diffusers"\n[[textual_inversion]]\npath = "embedding.pt"', "token: <toy> .* twice"),
        ('path = "diffusers"\ntoken = ""', "token: must not be empty"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(root: Path, section: str, message: str) -> None:
    with pytest.raises(BundleError, match=f"textual_inversion.*{message}") as raised:
        bundle(root, section)
    assert "\n" not in str(raised.value)


def test_a_word_of_the_vocabulary_is_refused(root: Path) -> None:
    made = bundle(root, 'path = "diffusers"\ntoken = "!"')
    with pytest.raises(BundleError, match="textual_inversion diffusers: Token ! already in tokenizer vocabulary"):
        load_base(made)
