"""Pipelines of diffusers that draw: their images, their safety checkers, what they are asked for and what they are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import nn

from overpaint.evaluation import DrawConfig, ImageFolder, draw, generate, plan
from overpaint.evaluation.images.drawable import PipelineDrawable, model_record
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy

PLANNED = plan({"benign": ["a red circle", "a blue dog", "a cat"]})


@pytest.fixture
def pipeline(pipeline_dir: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(pipeline_dir, safety_checker=None, requires_safety_checker=False)


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_pipeline_with_ddim_draws_the_policys_own_images(
    eta: float, size: int | None, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    policy = make_policy()
    pipeline: Any = policy.to_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    config = DrawConfig(steps=3, guidance_scale=4.0, eta=eta, size=size)
    own, other = (
        draw(drawable, PLANNED, config, model="m", batch_size=2, progress=False).stack.int()
        for drawable in (policy, PipelineDrawable(pipeline))
    )
    assert other.shape == (3, 3, size or 64, size or 64)
    assert (own - other).abs().max() <= 1
    assert (own != other).float().mean() < 0.01


def test_images_belong_to_their_seeds_and_not_to_their_batch(pipeline: Any, tmp_path: Path) -> None:
    drawable, config = PipelineDrawable(pipeline), DrawConfig(steps=2)
    planned = plan({"benign": ["a red circle", "a cat"]}, images_per_prompt=2)
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "progress": False}
    for batch_size in (1, 3):
        generate(drawable, planned, tmp_path, config, model=f"by-{batch_size}", batch_size=batch_size, **options)
    one, three = (ImageFolder.open(tmp_path, f"by-{count}").pixels(range(4)).int() for count in (1, 3))
    assert (one - three).abs().max() <= 1
    assert (one[0] - one[1]).abs().max() > 1


def test_the_pipelines_own_scheduler_draws(pipeline: Any) -> None:
    config = DrawConfig(steps=4)
    own = draw(PipelineDrawable(pipeline), PLANNED, config, model="m", progress=False).stack
    generators = [torch.Generator().manual_seed(image.seed) for image in PLANNED]
    prompts = [image.prompt for image in PLANNED]
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    expected = pipeline(prompts, generator=generators, num_inference_steps=4, guidance_scale=5.0, output_type="pil")
    for image, array in zip(own, map(numpy.array, expected.images), strict=True):
        assert numpy.array_equal(image.permute(1, 2, 0).numpy(), array)


class Checker(nn.Module):
    """Finds fault with every first image."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        images[0] = 0.0
        return images, [True] + [False] * (len(images) - 1)


def with_checker(pipeline: Any) -> Any:
    def extract(images: Any, return_tensors: str) -> Any:
        return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 8, 8)))

    pipeline.safety_checker, pipeline.feature_extractor = Checker(), extract
    return pipeline


def test_a_safety_checker_is_put_aside_and_the_record_says_so(pipeline: Any) -> None:
    bare = draw(PipelineDrawable(pipeline), PLANNED, DrawConfig(steps=1), model="m", progress=False).stack
    record = model_record(PipelineDrawable(pipeline), DrawConfig())
    assert record["safety_checker"] == "none"
    checked = with_checker(pipeline)
    drawable = PipelineDrawable(checked)
    assert torch.equal(draw(drawable, PLANNED, DrawConfig(steps=1), model="m", progress=False).stack, bare)
    assert isinstance(checked.safety_checker, Checker)
    assert model_record(drawable, DrawConfig()) == {**record, "safety_checker": "put aside"}


def test_a_safety_checker_that_is_kept_blackens_and_is_told_of(pipeline: Any) -> None:
    drawable = PipelineDrawable(with_checker(pipeline), keep_safety_checker=True)
    assert model_record(drawable, DrawConfig())["safety_checker"] == "on"
    with pytest.warns(UserWarning, match="safety checker blackened 1 images"):
        images = draw(drawable, PLANNED, DrawConfig(steps=1), model="m", progress=False).stack
    assert [bool(image.any()) for image in images] == [False, True, True]


def test_the_record_is_the_same_for_the_same_and_another_for_others(
    pipeline: Any, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    record = model_record(PipelineDrawable(pipeline), DrawConfig())
    assert record["class"] == "diffusers.StableDiffusionPipeline"
    assert (record["scheduler"]["class"], record["scheduler"]["skip_prk_steps"]) == ("PNDMScheduler", True)
    assert record == model_record(PipelineDrawable(make_policy().to_pipeline()), DrawConfig())
    assert record["weights"] == model_record(make_policy(), DrawConfig())["weights"]
    pipeline.text_encoder.get_parameter("final_layer_norm.bias").data[0] += 1.0
    assert record["weights"] != model_record(PipelineDrawable(pipeline), DrawConfig())["weights"]


def test_what_a_pipeline_cannot_do_is_refused(pipeline: Any) -> None:
    drawable = PipelineDrawable(pipeline)
    asked: dict[str, Any] = {"seeds": [1], "steps": 1}
    with pytest.raises(ValueError, match=r"eta must be 0 with a scheduler that has none, got 0\.5 with PNDMScheduler"):
        drawable.draw(["a"], guidance=ClassifierFree(5.0), eta=0.5, **asked)
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 1, which is none, for a pipeline, got 0\.5"):
        drawable.draw(["a"], guidance=ClassifierFree(0.5), **asked)
    with pytest.raises(ValueError, match="guidance must be ClassifierFree without a negative prompt"):
        drawable.draw(["a"], guidance=ClassifierFree(5.0, Conditioning(("",), torch.zeros(1, 24, 16))), **asked)


class Other:
    """A pipeline of another kind: no guidance and no size."""

    def __init__(self, images: numpy.ndarray) -> None:
        self.images = images
        self.components = {"scheduler": SimpleNamespace(config={"a": 1, "_file": 2})}

    def set_progress_bar_config(self, disable: bool) -> None:
        self.silent = disable

    def __call__(
        self, prompt: Any, num_inference_steps: int, generator: Any, output_type: str, guidance_scale: float = 0.0
    ) -> Any:
        return SimpleNamespace(images=self.images)


def test_pipelines_of_other_kinds_draw_or_say_what_they_lack() -> None:
    class Unconditional(Other):
        def __call__(self, batch_size: int, generator: Any, output_type: str) -> Any:  # ty: ignore[incompatible-method-override]
            return None

    with pytest.raises(ValueError, match="got Unconditional without prompt, num_inference_steps"):
        PipelineDrawable(Unconditional(numpy.zeros(1)))
    asked: dict[str, Any] = {"seeds": [1], "steps": 1, "guidance": ClassifierFree(2.0)}
    drawable = PipelineDrawable(Other(numpy.full((1, 4, 6, 3), 0.5)))
    assert drawable.draw(["a"], **asked).shape == (1, 3, 4, 6)
    assert drawable.description()["scheduler"] == {"class": "SimpleNamespace", "a": 1}
    with pytest.raises(ValueError, match="height must be something that the pipeline takes, got 8 for a Other"):
        drawable.draw(["a"], height=8, width=8, **asked)
    with pytest.raises(ValueError, match=r"pipeline must give RGB images, got shape \(1, 4, 6, 1\)"):
        PipelineDrawable(Other(numpy.zeros((1, 4, 6, 1)))).draw(["a"], **asked)
