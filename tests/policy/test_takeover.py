from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overpaint.policy import DiffusionPolicy, LoRAConfig, merged_state

PROMPT = "a red circle"


def load(folder: Path, **options: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, dtype=torch.float32, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(pipeline_dir: Path) -> Any:
    """The tiny pipeline in memory."""
    return load(pipeline_dir)


def with_ddim(pipeline: Any) -> Any:
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


def own_picture(pipeline: Any, prompt: str | None = PROMPT, **options: Any) -> torch.Tensor:
    """What the pipeline itself draws."""
    drawn = pipeline(
        prompt, num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
        output_type="pt", **options,
    )  # fmt: skip
    return drawn.images[0]


def picture(policy: DiffusionPolicy, prompt: str = PROMPT) -> torch.Tensor:
    return policy.draw([prompt], seeds=[0], steps=3)[0]


def compile_part(name: str) -> Callable[[Any], None]:
    return lambda pipeline: setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend="eager"))


def compile_block(pipeline: Any) -> None:
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")


def fuse_and_part(pipeline: Any) -> None:
    pipeline.fuse_qkv_projections()
    pipeline.unfuse_qkv_projections()


UNDONE = {
    "unet compiled": compile_part("unet"),
    "vae compiled": compile_part("vae"),
    "text encoder compiled": compile_part("text_encoder"),
    "block compiled": compile_block,
    "unet compiled in place": lambda pipeline: pipeline.unet.compile(backend="eager"),
    "projections fused": lambda pipeline: pipeline.fuse_qkv_projections(),
    "projections fused and parted": fuse_and_part,
    "attention sliced": lambda pipeline: pipeline.enable_attention_slicing(1),
    "plain attention": lambda pipeline: pipeline.unet.set_default_attn_processor(),
    "vae sliced and tiled": lambda pipeline: (pipeline.vae.enable_slicing(), pipeline.vae.enable_tiling()),
    "a picture drawn before": lambda pipeline: own_picture(pipeline),
}


@pytest.mark.parametrize("state", UNDONE)
def test_pipelines_state_leaves_no_trace_in_what_is_drawn_trained_and_saved(
    state: str, pipeline: Any, pipeline_dir: Path, tmp_path: Path, stir: Callable[[DiffusionPolicy], None]
) -> None:
    from safetensors.torch import load_file

    plain = DiffusionPolicy(load(pipeline_dir), device="cpu", lora=LoRAConfig(rank=2))
    UNDONE[state](pipeline)
    policy = DiffusionPolicy(pipeline, device="cpu", lora=LoRAConfig(rank=2))
    torch.testing.assert_close(picture(policy), picture(plain), rtol=0, atol=1e-5)
    stir(plain)
    stir(policy)
    torch.testing.assert_close(picture(policy), picture(plain), rtol=0, atol=1e-4)
    assert merged_state(policy.unet).keys() == merged_state(plain.unet).keys()

    policy.predict_clean(torch.zeros(1, 4, 8, 8), policy.encode([PROMPT]), step=0, steps=2).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())
    for name, each in (("plain", plain), ("ours", policy)):
        each.save_lora(tmp_path / name / "lora")
        each.save_pipeline(tmp_path / name / "pipeline")
    for file in ("lora/pytorch_lora_weights", *(f"pipeline/{part}" for part in WEIGHT_FILES)):
        names = [load_file(tmp_path / name / f"{file}.safetensors").keys() for name in ("plain", "ours")]
        assert names[0] == names[1]


WEIGHT_FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


def test_a_change_that_an_erasure_makes_shows_where_projections_were_fused(pipeline: Any) -> None:
    pipeline.fuse_qkv_projections()
    policy = DiffusionPolicy(pipeline, device="cpu", train="xattn-kv")
    before = picture(policy)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(0.5)
    assert not torch.equal(picture(policy), before)


def adapter(name: str) -> Callable[[Any], None]:
    def add(pipeline: Any) -> None:
        import peft

        targets = ["to_q"] if name == "unet" else ["q_proj"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), getattr(pipeline, name))

    return add


def fused_adapter(pipeline: Any) -> None:
    adapter("unet")(pipeline)
    pipeline.unet.fuse_lora()


def hook(pipeline: Any) -> None:
    pipeline.unet.mid_block.register_forward_hook(lambda module, inputs, output: output * 2)


def own_forward(pipeline: Any) -> None:
    pipeline.unet.forward = lambda *args, **options: (torch.zeros(2, 4, 8, 8),)


def accelerate_hook(pipeline: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipeline.vae, ModelHook())


def layerwise_casting(pipeline: Any) -> None:
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def patched_class(pipeline: Any) -> None:
    block = pipeline.unet.mid_block
    block.__class__ = type("MergingBlock", (type(block),), {"__module__": "tomesd.patch"})


class OtherProcessor:
    """An attention of another kind."""


def other_attention(pipeline: Any) -> None:
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = OtherProcessor()


def on_meta(pipeline: Any) -> None:
    pipeline.text_encoder.to("meta")


def small_vae(pipeline: Any) -> None:
    from diffusers import AutoencoderTiny

    pipeline.vae = AutoencoderTiny()


def consistency(pipeline: Any) -> None:
    pipeline.unet.register_to_config(time_cond_proj_dim=8)


REFUSED = {
    "unet's LoRA": (adapter("unet"), "the UNet's layer '.*' must carry no adapter, got a LoRA; fuse_lora"),
    "unet's LoRA fused and left": (fused_adapter, "the UNet's layer '.*' must carry no adapter"),
    "text encoder's LoRA": (adapter("text_encoder"), "the text encoder's layer '.*' must carry no adapter"),
    "FreeU": (lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), r"without FreeU, .* disable_freeu\(\)"),
    "hook": (hook, "the UNet's layer 'mid_block' must compute as its class does, got a hook of"),
    "forward": (own_forward, "the UNet must compute as its class does, got a forward of its own"),
    "offloading": (accelerate_hook, "the VAE must compute as its class does, got a forward of its own"),
    "layerwise casting": (layerwise_casting, "the UNet's layer '.*' must compute as its class does"),
    "token merging": (patched_class, "'mid_block' must be of torch or .* got a tomesd.MergingBlock"),
    "attention": (other_attention, "the UNet's attention must be diffusers' own, got OtherProcessor"),
    "weights elsewhere": (on_meta, "the text encoder's weights must be in memory .* on the device meta"),
    "another VAE": (small_vae, "the VAE must be a AutoencoderKL, got a AutoencoderTiny"),
    "latent consistency": (consistency, "got one that reads the scale of guidance"),
}


@pytest.mark.parametrize("state", REFUSED)
def test_state_that_would_be_lost_or_hide_what_is_trained_is_refused(state: str, pipeline: Any) -> None:
    carry, message = REFUSED[state]
    carry(pipeline)
    with pytest.raises(ValueError, match=message):
        DiffusionPolicy(pipeline, device="cpu")


def test_pipeline_made_in_inference_mode_is_refused(pipeline_dir: Path) -> None:
    with torch.inference_mode():
        pipeline = load(pipeline_dir)
        pipeline.unet.conv_in.weight = nn.Parameter(torch.ones_like(pipeline.unet.conv_in.weight))
    with pytest.raises(ValueError, match=r"the UNet's weights .* 'conv_in.weight' made under torch.inference_mode"):
        DiffusionPolicy(pipeline, device="cpu")


def test_adapter_that_was_fused_and_unloaded_is_taken_over(pipeline: Any) -> None:
    import peft

    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_adapter = own_picture(with_ddim(pipeline))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(picture(DiffusionPolicy(pipeline, device="cpu")), with_adapter, rtol=0, atol=1e-4)


def test_pipeline_in_half_precision_comes_to_float32_without_a_word(
    pipeline: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.to(torch.float16)
    caplog.clear()
    capfd.readouterr()
    policy = DiffusionPolicy(pipeline, device="cpu")
    assert {policy.dtype, policy.vae.dtype, policy.text_encoder.dtype} == {torch.float32}
    assert (caplog.records, capfd.readouterr()) == ([], ("", ""))


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_scheduler_that_clips_is_refused(setting: str, pipeline: Any) -> None:
    from diffusers import DDIMScheduler

    settings = {"clip_sample": False} | {setting: True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    with pytest.raises(
        ValueError, match=f"scheduler's {setting} must be False, .* got True in DDIMScheduler; set it in"
    ):
        DiffusionPolicy(pipeline, device="cpu")


def test_a_setting_that_the_scheduler_does_not_know_is_no_reason_to_refuse(pipeline: Any) -> None:
    from diffusers import PNDMScheduler

    scheduler: Any = PNDMScheduler.from_config(pipeline.scheduler.config)
    scheduler.register_to_config(clip_sample=True)
    assert scheduler.config.clip_sample
    pipeline.scheduler = scheduler
    DiffusionPolicy(pipeline, device="cpu")


@pytest.mark.parametrize(
    "kind",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_every_scheduler_of_stable_diffusion_is_taken_over(kind: str, zero: bool, pipeline: Any) -> None:
    import diffusers

    settings: dict[str, Any] = {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)
    policy = DiffusionPolicy(pipeline, device="cpu")
    assert (policy.process.levels(torch.tensor([policy.num_timesteps - 1])) < 1e-6) == zero


def test_noise_levels_that_the_configuration_does_not_show_are_refused(pipeline: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match="cumulative alphas must be those of its configuration, got others in PNDM"):
        DiffusionPolicy(pipeline, device="cpu")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"must have cumulative alphas, .* got FlowMatchEulerDiscreteScheduler"):
        DiffusionPolicy(pipeline, device="cpu")


def test_layers_that_the_text_encoder_lacks_are_skipped_and_an_argument_of_a_call_is_refused(
    pipeline: Any, tmp_path: Path
) -> None:
    def skipped(text: str) -> torch.Tensor:
        ids = pipeline.tokenizer(text, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
        hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        return pipeline.text_encoder.final_layer_norm(hidden)

    embeddings = {"prompt_embeds": skipped(PROMPT), "negative_prompt_embeds": skipped("")}
    theirs = own_picture(with_ddim(pipeline), None, clip_skip=1, **embeddings)
    with pytest.raises(ValueError, match="must have been called without clip_skip, got 1"):
        DiffusionPolicy(pipeline, device="cpu")
    own_picture(pipeline)
    pipeline.text_encoder.encoder.layers = pipeline.text_encoder.encoder.layers[:-1]
    pipeline.text_encoder.config.num_hidden_layers -= 1
    policy = DiffusionPolicy(pipeline, device="cpu")
    torch.testing.assert_close(picture(policy), theirs, rtol=0, atol=1e-4)
    policy.save_pipeline(tmp_path)
    torch.testing.assert_close(own_picture(with_ddim(load(tmp_path))), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_draws_what_it_draws_in_the_pipeline(vectors: int, pipeline: Any) -> None:
    embedding = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(0))
    pipeline.load_textual_inversion({"<thing>": embedding}, token="<thing>")
    theirs = own_picture(with_ddim(pipeline), "a <thing> circle")
    policy = DiffusionPolicy(pipeline, device="cpu")
    torch.testing.assert_close(picture(policy, "a <thing> circle"), theirs, rtol=0, atol=1e-4)
    assert len(policy.prompts.ids("a <thing> circle")) == 4 + vectors
    assert not torch.allclose(picture(policy, "a circle"), theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe"])
def test_pipeline_around_the_same_parts_is_taken_over(name: str, pipeline: Any, pipeline_dir: Path) -> None:
    import diffusers

    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    other = getattr(diffusers, name)(**parts, requires_safety_checker=False)
    plain = DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    assert torch.equal(picture(DiffusionPolicy(other, device="cpu")), picture(plain))
