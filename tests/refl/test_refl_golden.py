"""One complete ReFL step against numbers of the authors' code: images, rewards, gradients and the update."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy import ClassifierFree, DiffusionPolicy
from refl import ReFLConfig, ReFLTrainer, graded_images, hinge
from rewards import ImageReward, ImageRewardConfig
from rewards.preprocess import normalise, resize_and_crop
from training import TrainingConfig, TrainingRun, make_optimizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
UNGUIDED = ClassifierFree(1.0)
SEED_OF_ORDER = 3
"""Seed of a run whose first batch of two is the first prompt, then the second."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "refl_step.safetensors")


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return json.loads((GOLDEN / "refl_step.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """What the reward was asked about; their token ids are compared in a test."""
    return json.loads((GOLDEN / "image_reward_small.json").read_text(encoding="utf-8"))["prompts"][:2]


@pytest.fixture(scope="module")
def reward() -> ImageReward:
    """The small network in the official layout; frozen."""
    case = json.loads((GOLDEN / "image_reward_small.json").read_text(encoding="utf-8"))
    text, vision = case["config"]["text"], case["config"]["vision"]
    config = ImageRewardConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_hidden_size=vision["hidden_size"],
        vision_layers=vision["depth"],
        vision_heads=vision["heads"],
        vision_intermediate_size=vision["hidden_size"] * vision["mlp_ratio"],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_intermediate_size=text["intermediate_size"],
        max_positions=text["max_position_embeddings"],
    )
    return ImageReward.from_official(GOLDEN / "image_reward_small_weights.safetensors", config, case["vocab"])


@pytest.fixture
def golden_policy(case: dict[str, Any], pipeline_dir: Path) -> DiffusionPolicy:
    """The golden UNet, all of it trained, and the golden decoder; prompts are never encoded."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    unet: Any = diffusers.UNet2DConditionModel(**case["unet_config"])
    unet.load_state_dict(load_file(GOLDEN / "refl_tiny_unet.safetensors"))
    vae: Any = diffusers.AutoencoderKL(**case["vae_config"])
    missing, unknown = vae.load_state_dict(load_file(GOLDEN / "refl_tiny_vae_decoder.safetensors"), strict=False)
    assert not unknown
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    make: Any = diffusers.StableDiffusionPipeline
    pipeline = make(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(pipeline_dir / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(pipeline_dir / "tokenizer"),
        unet=unet,
        scheduler=diffusers.DDPMScheduler.from_config(case["scheduler"]["config"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return DiffusionPolicy.from_pipeline(pipeline, train="full", device="cpu")


class RecordedNoise:
    """The noises of the golden case in their order, in place of a policy's own."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        self.noises: Iterator[Tensor] = iter([golden["initial_latents"], *golden["step_noises"]])

    def draw(self) -> Tensor:
        return next(self.noises)


@pytest.fixture
def recorded(
    golden: dict[str, Tensor], golden_policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> DiffusionPolicy:
    """The golden policy, which draws the golden noises and encodes any two prompts as the golden embeddings."""
    monkeypatch.setattr(golden_policy, "_noise", lambda *_: RecordedNoise(golden))
    monkeypatch.setattr(golden_policy, "encode", lambda _: golden["encoder_hidden_states"])
    return golden_policy


@pytest.fixture
def at_graded_step(
    golden: dict[str, Tensor], golden_policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DiffusionPolicy]:
    """The golden policy, whose rollout ends in the very golden latents, with attention computed the plain way.

    The case has a pixel on the edge of the clamp to [0, 1]: a change of the latents by 1e-6, or the fused attention,
    puts it on the other side, and the gradient jumps by 5e-4 of its largest entry. The rollout has a test of its own.
    """
    monkeypatch.setattr(golden_policy, "sample", lambda *_, **__: golden["latents_before_graded_step"])
    monkeypatch.setattr(golden_policy, "encode", lambda _: golden["encoder_hidden_states"])
    with sdpa_kernel(SDPBackend.MATH):
        yield golden_policy


@pytest.fixture
def settings(case: dict[str, Any]) -> ReFLConfig:
    """The authors' settings with the golden graded step, and without the pretraining term that their code lacks."""
    graded = case["hyperparameters"]["mid_timestep_index"]
    return ReFLConfig(
        batch_size=2,
        micro_batch_size=2,
        steps=case["hyperparameters"]["num_steps"],
        first_graded_step=graded,
        last_graded_step=graded,
        pretraining_weight=0.0,
    )


@pytest.fixture
def make_run_config(case: dict[str, Any], tmp_path: Path) -> Callable[[], TrainingConfig]:
    hyper = case["hyperparameters"]

    def make() -> TrainingConfig:
        return TrainingConfig(
            output_dir=tmp_path,
            iterations=1,
            learning_rate=hyper["learning_rate"],
            weight_decay=hyper["weight_decay"],
            max_grad_norm=hyper["max_grad_norm"],
            seed=SEED_OF_ORDER,
            progress=False,
        )

    return make


def test_default_settings_are_the_authors(case: dict[str, Any]) -> None:
    hyper, config = case["hyperparameters"], ReFLConfig()
    assert config.steps == hyper["num_steps"]
    assert [config.first_graded_step, config.last_graded_step] == hyper["official_index_range_inclusive"]
    assert config.reward_margin == hyper["threshold"]
    assert config.reward_scale == hyper["grad_scale"]


def test_timesteps_are_the_golden_ones(golden_policy: DiffusionPolicy, golden: dict[str, Tensor], case: dict) -> None:
    timesteps = golden_policy.timesteps(40)
    assert torch.equal(timesteps, golden["timesteps"])
    assert timesteps[33] == case["hyperparameters"]["graded_timestep"]


def test_token_ids_of_the_reward_are_the_golden_ones(
    reward: ImageReward, prompts: list[str], golden: dict[str, Tensor]
) -> None:
    tokens = reward.tokenizer(prompts, reward.config.max_length)
    assert torch.equal(tokens.ids, golden["rm_input_ids"])
    assert torch.equal(tokens.mask, golden["rm_attention_mask"])


def test_rollout_with_the_golden_noises_is_the_golden_rollout(
    golden_policy: DiffusionPolicy, golden: dict[str, Tensor]
) -> None:
    latents, embeddings = golden["initial_latents"], golden["encoder_hidden_states"]
    states = []
    with torch.no_grad():
        for step, noise in enumerate(golden["step_noises"]):
            latents = golden_policy.denoise(
                latents, embeddings, step=step, steps=40, guidance=UNGUIDED, eta=1.0, noise=noise
            )
            states.append(latents)
    for step, name in ((0, "after_step0"), (9, "after_step9"), (32, "before_graded_step")):
        torch.testing.assert_close(states[step], golden[f"latents_{name}"], rtol=0, atol=2e-5)


def test_hinge_of_golden_rewards(golden: dict[str, Tensor]) -> None:
    rewards = golden["loss_only/rewards"].clone().requires_grad_()
    loss = 1e-3 * hinge(rewards, margin=2.0).mean()
    torch.testing.assert_close(loss, golden["loss_only/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, rewards)[0], golden["loss_only/grad"], rtol=1e-5, atol=0)


def test_graded_step_is_the_golden_one(
    golden_policy: DiffusionPolicy, golden: dict[str, Tensor], reward: ImageReward, prompts: list[str]
) -> None:
    latents, embeddings = golden["latents_before_graded_step"], golden["encoder_hidden_states"]
    with torch.no_grad():
        timesteps = golden_policy.timesteps(40)[33].expand(2)
        prediction = golden_policy.predict_noise(latents, timesteps, embeddings)
        clean = golden_policy.predict_clean(latents, embeddings, step=33, steps=40, guidance=UNGUIDED)
        images = golden_policy.decode(clean)
        pixels = normalise(resize_and_crop(images, 224))
        rewards = reward(images, prompts)
    torch.testing.assert_close(prediction, golden["noise_pred_graded"], rtol=0, atol=2e-5)
    torch.testing.assert_close(clean, golden["pred_x0"], rtol=0, atol=2e-5)
    torch.testing.assert_close(clean / 0.18215, golden["vae_input"], rtol=1e-5, atol=1e-4)  # 2e-5 / 0.18215
    torch.testing.assert_close(images[:1], golden["image"], rtol=0, atol=4e-5)
    torch.testing.assert_close(pixels[:, :, 96:128, 96:128], golden["preprocessed_image_crop"], rtol=0, atol=6e-5)
    torch.testing.assert_close(
        pixels.mean(dim=(2, 3)), golden["preprocessed_image_mean_per_channel"], rtol=0, atol=6e-5
    )
    torch.testing.assert_close(rewards, golden["rewards"], rtol=0, atol=4e-5)


def test_gradient_and_update_of_the_graded_images_are_the_golden_ones(
    at_graded_step: DiffusionPolicy,
    golden: dict[str, Tensor],
    case: dict[str, Any],
    reward: ImageReward,
    prompts: list[str],
    settings: ReFLConfig,
    make_run_config: Callable[[], TrainingConfig],
) -> None:
    images = graded_images(at_graded_step, prompts, [0, 1], settings, graded_step=33)
    torch.testing.assert_close(images[:1].detach(), golden["image"], rtol=0, atol=4e-5)
    loss = settings.reward_scale * hinge(reward(images, prompts), margin=settings.reward_margin).mean()
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)
    loss.backward()

    parameters = dict(at_graded_step.unet.named_parameters())
    assert list(parameters) == case["parameter_names"]
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert grads.keys() == parameters.keys()
    for name in ("conv_in.bias", "conv_out.weight", "time_embedding.linear_1.bias"):
        expected = golden[f"grad/{name}"]
        torch.testing.assert_close(grads[name], expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    total = float(golden["grad_norm_total"])
    norms = torch.stack([grad.norm() for grad in grads.values()])
    torch.testing.assert_close(norms, golden["grad_norm_per_parameter"], rtol=5e-5, atol=1e-6 * total)
    squares: dict[str, float] = defaultdict(float)
    for name, norm in zip(grads, norms.tolist(), strict=True):
        group = ".".join(name.split(".")[: 2 if name.startswith(("down_blocks", "up_blocks")) else 1])
        squares[group] += norm**2
    assert {group: square**0.5 for group, square in squares.items()} == pytest.approx(
        case["grad_norm_per_group"], rel=5e-5
    )

    optimizer = make_optimizer(at_graded_step.trainable_parameters(), make_run_config())
    norm = nn.utils.clip_grad_norm_(at_graded_step.trainable_parameters(), make_run_config().max_grad_norm)
    torch.testing.assert_close(norm, golden["grad_norm_total"], rtol=1e-5, atol=0)
    expected = golden["grad_clipped/conv_out.weight"]
    torch.testing.assert_close(grads["conv_out.weight"], expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    optimizer.step()
    assert_updated(at_graded_step, golden)


def test_whole_iteration_of_the_trainer_is_the_golden_one(
    at_graded_step: DiffusionPolicy,
    golden: dict[str, Tensor],
    reward: ImageReward,
    prompts: list[str],
    settings: ReFLConfig,
    make_run_config: Callable[[], TrainingConfig],
) -> None:
    trainer = ReFLTrainer(at_graded_step, reward, prompts, settings)
    with TrainingRun(at_graded_step, make_run_config()) as run:
        metrics = trainer.step(run)
    assert metrics.graded_step == 33
    assert metrics.reward == pytest.approx(float(golden["rewards"].mean()), abs=4e-5)
    assert metrics.reward_loss * settings.reward_scale == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(float(golden["grad_norm_total"]), rel=1e-5)
    assert_updated(at_graded_step, golden)


def assert_updated(policy: DiffusionPolicy, golden: dict[str, Tensor]) -> None:
    """Compares the weights after one step of AdamW, to a hundredth of the learning rate."""
    weights = policy.trainable_state()
    for name in ("conv_in.bias", "conv_out.weight"):
        torch.testing.assert_close(weights[name], golden[f"updated/{name}"], rtol=0, atol=1e-2 * 1e-5)
