"""Complete diffusers pipeline folders with tiny random networks: Stable Diffusion 1.5, 2.1, and XL."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from .layout import as_published, write_scheduler
from .tokenizer import VOCABULARY_SIZE, write_tokenizer
from .weights import calibrate, generator, normal, private_rng, randomize

Family = Literal["sd15", "sd2", "sdxl", "sdxl_refiner"]
Encoder = Literal["vit_h", "big_g"]

SAMPLE_SIZE = 8  # latents; 64 pixels
IMAGE_SIZE = 32  # of the CLIP vision encoders
CROSS_ATTENTION_DIM = {"sd15": 48, "sd2": 64, "sdxl": 128, "sdxl_refiner": 80}  # really 768, 1024, 2048, and 1280
TEXT_ENCODER = {"sd15": (48, "quick_gelu"), "sd2": (64, "gelu"), "sdxl": (48, "quick_gelu")}  # width, activation
THROUGH, PREDICTED = 0.95, 0.2  # how much of the predicted noise comes from the sample, and how much from the network
LAYERS_PER_BLOCK = {"sd15": 1, "sd2": 1, "sdxl": 2, "sdxl_refiner": 1}
VISION = {  # hidden size, projection: (1280, 1024) and (1664, 1280) in the real ones
    "vit_h": (80, 64),
    "big_g": (104, 80),
}


def make_sd15(
    folder: str | Path,
    *,
    in_channels: int = 4,
    safety_checker: bool = False,
    time_cond_proj_dim: int | None = None,
    layers_per_block: int = LAYERS_PER_BLOCK["sd15"],
    levels: int = 4,
    seed: int = 0,
) -> Path:
    """Write a Stable Diffusion 1.5 folder. Its default size is 64 x 64; its UNet has 10 cross-attention layers.

    `in_channels=9` creates an inpainting checkpoint; `time_cond_proj_dim` a distilled one (LCM) whose UNet takes the
    guidance scale as `timestep_cond`; `layers_per_block=2` the real layout with 16 cross-attention layers; `levels=2` a
    UNet with only two resolutions, for bundles that would take long to export.
    """
    folder = Path(folder)
    with private_rng():
        vae = _vae(seed + 1, scaling_factor=0.18215)
        changes = {"in_channels": in_channels, "time_cond_proj_dim": time_cond_proj_dim}
        unet = _unet(unet_config("sd15", layers_per_block, levels) | changes, seed + 2)
        text_encoder = randomize(CLIPTextModel(text_config(*TEXT_ENCODER["sd15"])), seed + 3)
        extractor = CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)
        checker = _safety_checker(seed + 4, vae, extractor) if safety_checker else None
        pipeline_class = StableDiffusionInpaintPipeline if in_channels == 9 else StableDiffusionPipeline
        pipeline = pipeline_class(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=write_tokenizer(folder / "tokenizer"),
            unet=unet,
            scheduler=(PNDMScheduler if time_cond_proj_dim is None else LCMScheduler)(steps_offset=1),
            safety_checker=checker,
            feature_extractor=extractor,
            requires_safety_checker=safety_checker,
        )
        pipeline.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer")
    if time_cond_proj_dim is None:
        config = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
    else:
        config = {"_class_name": "LCMScheduler", "set_alpha_to_one": True, "original_inference_steps": 50}
    write_scheduler(folder, config)
    as_published(folder)
    return folder


def make_sd2(folder: str | Path, *, levels: int = 4, seed: int = 0) -> Path:
    """Write a Stable Diffusion 2.1 folder: an OpenCLIP text encoder, and a UNet that predicts v.

    As in the public folder, the text encoder lacks the last layer of OpenCLIP's, so its output is the penultimate one.
    """
    folder = Path(folder)
    with private_rng():
        pipeline = StableDiffusionPipeline(
            vae=_vae(seed + 1, scaling_factor=0.18215),
            text_encoder=randomize(CLIPTextModel(text_config(*TEXT_ENCODER["sd2"])), seed + 3),
            tokenizer=write_tokenizer(folder / "tokenizer", pad_token="!"),
            unet=_unet(unet_config("sd2", levels=levels), seed + 2),
            scheduler=DDIMScheduler(steps_offset=1),
            safety_checker=None,
            feature_extractor=CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE),
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer", pad_token="!")
    config = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False}
    write_scheduler(folder, config)
    as_published(folder)
    return folder


def make_sdxl(
    folder: str | Path,
    *,
    in_channels: int = 4,
    layers_per_block: int = LAYERS_PER_BLOCK["sdxl"],
    seed: int = 0,
) -> Path:
    """Write a Stable Diffusion XL folder. Its default size is 64 x 64.

    With two layers per block, the per-block scales of diffusers' guide (InstantStyle) fit unchanged.
    """
    folder = Path(folder)
    with private_rng():
        vae = _vae(seed + 1, scaling_factor=0.13025, force_upcast=True)
        unet = _unet(unet_config("sdxl", layers_per_block) | {"in_channels": in_channels}, seed + 2)
        pipeline_class = StableDiffusionXLInpaintPipeline if in_channels == 9 else StableDiffusionXLPipeline
        pipeline = pipeline_class(
            vae=vae,
            text_encoder=randomize(CLIPTextModel(text_config(*TEXT_ENCODER["sdxl"])), seed + 3),
            text_encoder_2=randomize(CLIPTextModelWithProjection(text_config(80, "gelu")), seed + 4),
            tokenizer=write_tokenizer(folder / "tokenizer"),
            tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad_token="!"),
            unet=unet,
            scheduler=EulerDiscreteScheduler(steps_offset=1),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer")
    return _finish_sdxl(folder)


def make_sdxl_refiner(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a folder of SDXL's refiner: only the second text encoder, four resolutions, and an aesthetic score."""
    folder = Path(folder)
    with private_rng():
        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=_vae(seed + 1, scaling_factor=0.13025, force_upcast=True),
            text_encoder=None,
            text_encoder_2=randomize(CLIPTextModelWithProjection(text_config(80, "gelu")), seed + 4),
            tokenizer=None,
            tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad_token="!"),
            unet=_unet(unet_config("sdxl_refiner"), seed + 5),
            scheduler=EulerDiscreteScheduler(steps_offset=1),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)
    return _finish_sdxl(folder)


def _finish_sdxl(folder: Path) -> Path:
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
    write_scheduler(folder, config)
    as_published(folder)
    return folder


def unet_config(family: Family, layers_per_block: int | None = None, levels: int = 4) -> dict[str, Any]:
    """Return arguments for `UNet2DConditionModel`: the real block layout, but narrow; SDXL models ignore `levels`."""
    common: dict[str, Any] = {
        "sample_size": SAMPLE_SIZE,
        "layers_per_block": layers_per_block or LAYERS_PER_BLOCK[family],
        "norm_num_groups": 8,
        "cross_attention_dim": CROSS_ATTENTION_DIM[family],
    }
    if not family.startswith("sdxl"):
        heads: dict[str, Any] = {"attention_head_dim": 8}  # the number of heads, as in the real configuration
        if family == "sd2":
            heads = {"attention_head_dim": (2, 4, 8, 8)[:levels], "use_linear_projection": True}
        return common | {
            "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            "block_out_channels": (32, 64, 64, 64)[:levels],
            **heads,
        }
    common |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 16}
    if family == "sdxl_refiner":
        return common | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64, 64, 64),
            "transformer_layers_per_block": 2,
            "attention_head_dim": (2, 4, 8, 8),
            "projection_class_embeddings_input_dim": 80 + 5 * 16,  # pooled text and five numbers
        }
    return common | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),  # numbers of heads, as in the real configuration
        "projection_class_embeddings_input_dim": 80 + 6 * 16,  # pooled text and six numbers
    }


def vision_config(kind: Encoder) -> CLIPVisionConfig:
    """The tiny relatives of OpenCLIP's ViT-H/14 (`vit_h`) and ViT-bigG/14 (`big_g`)."""
    hidden_size, projection_dim = VISION[kind]
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection_dim,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_act="gelu",
    )


def text_config(hidden_size: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=hidden_act,
        bos_token_id=0,
        # The public configurations have 2 instead of the tokenizer's id; transformers then takes the highest id as end.
        eos_token_id=2,
        pad_token_id=1,
    )


@torch.no_grad()
def _vae(seed: int, *, scaling_factor: float, force_upcast: bool = False) -> AutoencoderKL:
    """Build a VAE whose scaled latents have about unit variance, and whose pictures use most of 0..255."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8 * SAMPLE_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )
    randomize(vae, seed)
    rng = generator(seed)
    pixels, latents = normal(rng, 4, 3, 64, 64, std=0.5), normal(rng, 8, 4, SAMPLE_SIZE, SAMPLE_SIZE)
    calibrate(vae.decoder.conv_out, lambda: vae.decode(latents / scaling_factor).sample, 0.45)
    calibrate(vae.quant_conv, lambda: vae.encode(pixels).latent_dist.parameters, 1 / scaling_factor)
    vae.quant_conv.weight[4:].mul_(0.1)
    vae.quant_conv.bias[4:].fill_(-2)  # log variance: some noise, so that a sampled encoding differs from its mode
    return vae


@torch.no_grad()
def _unet(config: dict[str, Any], seed: int) -> UNet2DConditionModel:
    """Build a UNet that, like a trained one, predicts noise of unit variance that is partly the noise in the sample."""
    unet = UNet2DConditionModel(**config)
    randomize(unet, seed)
    rng = generator(seed)
    sample = normal(rng, 4, unet.config.in_channels, SAMPLE_SIZE, SAMPLE_SIZE)
    arguments: dict[str, Any] = {"encoder_hidden_states": normal(rng, 4, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        refiner = unet.config.cross_attention_dim == CROSS_ATTENTION_DIM["sdxl_refiner"]
        time_ids = torch.tensor([[64.0, 64, 0, 0, 6] if refiner else [64.0, 64, 0, 0, 64, 64]]).repeat(4, 1)
        width = config["projection_class_embeddings_input_dim"] - time_ids.shape[1] * config["addition_time_embed_dim"]
        arguments["added_cond_kwargs"] = {"text_embeds": normal(rng, 4, width), "time_ids": time_ids}
    calibrate(unet.conv_out, lambda: unet(sample, torch.tensor([900, 600, 300, 50]), **arguments).sample, PREDICTED)
    _let_noise_through(unet)
    return unet


def _let_noise_through(unet: UNet2DConditionModel) -> None:
    """Add a path from input to output, so that latents keep about unit variance during denoising.

    Without it, predictions are unrelated to the sample: latents grow to fifteen times the size of encoded pictures, and
    drown what image-to-image and inpainting keep of a picture. The path follows the last skip connection in the first
    eight channels, four for x and four for -x, because silu(x) - silu(-x) = x.
    """
    skip = unet.conv_in.out_channels
    last = unet.up_blocks[-1]
    shortcut, second = last.resnets[-1].conv_shortcut, last.resnets[-1].conv2
    unet.conv_in.weight[:8] = 0
    unet.conv_in.bias[:8] = 0
    shortcut.weight[:8] = 0
    shortcut.bias[:8] = 0
    quiet = [second] + [attention.proj_out for attention in getattr(last, "attentions", [])[-1:]]
    for layer in quiet:
        layer.weight[:8] *= 0.3
        layer.bias[:8] = 0
    for channel in range(4):
        for row, sign in ((channel, 1.0), (channel + 4, -1.0)):
            unet.conv_in.weight[row, channel, 1, 1] = sign
            shortcut.weight[row, row - skip, 0, 0] = 1.0
            unet.conv_out.weight[channel, row, 1, 1] += sign * THROUGH


@torch.no_grad()
def _safety_checker(seed: int, vae: AutoencoderKL, extractor: CLIPImageProcessor) -> StableDiffusionSafetyChecker:
    """Build a checker that flags about half of all pictures: those whose embedding is on one side of the average."""
    vision = vision_config("vit_h")
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={}, vision_config=vision.to_dict(), projection_dim=vision.projection_dim)
    )
    randomize(checker, seed)
    latents = normal(generator(seed), 32, 4, SAMPLE_SIZE, SAMPLE_SIZE) / vae.config.scaling_factor
    pictures = VaeImageProcessor().postprocess(vae.decode(latents).sample)
    pixels = extractor(images=pictures, return_tensors="pt").pixel_values
    embeds = checker.visual_projection(checker.vision_model(pixels).pooler_output)
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    concept = embeds[0] - embeds.mean(0)
    checker.concept_embeds[0] = concept
    checker.concept_embeds_weights.fill_(1.0)  # a cosine never exceeds 1
    checker.concept_embeds_weights[0] = (embeds @ concept / concept.norm()).median()
    checker.special_care_embeds_weights.fill_(1.0)
    return checker
