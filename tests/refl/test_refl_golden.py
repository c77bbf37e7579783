"""One complete ReFL step against numbers of the authors' code: images, rewards, gradients and the update.

The gradient is compared in float64. One pixel of the case lies 2.6e-6 below 1 before the clamp to [0, 1], closer than
float32 knows it: where rounding puts it on the other side, its gradient goes out and the whole by 5e-5. In float64 the
file's own float32 is all that is left of the difference, on any processor. In float32 the values are compared with the
file, and the gradient with that in float64 through the pixels whose side is certain.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN, GoldenCase, Record, Tensors, image_reward_config, numbers
from safetensors.torch import load_file
from torch import Tensor, nn

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, SampleNoise
from overpaint.training import TrainingConfig, TrainingRun, make_optimizer
from refl import ReFLConfig, ReFLTrainer, hinge, one_step_images
from rewards import ImageReward
from rewards.preprocess import normalise, resize_and_crop

CASE = GoldenCase(
    "refl_step",
    left_out={
        "weights/*": "words about the files beside it",
        "scheduler/variance_type": "diffusers' name of eta = 1, which the rollout's test holds the policy to",
        "scheduler/cls": "whose timesteps and noise levels they are; both are compared",
    },
)
UNGUIDED = ClassifierFree(1.0)
SEED_OF_ORDER = 3
"""Seed of a run whose first batch of two is the first prompt, then the second."""
CERTAIN = 1e-3
"""How far from 0 and 1 a pixel must be before the clamp to be on the same side in float32: it is known to 1e-5."""
SINGLE = 2e-4
"""Part of a gradient that float32 may get wrong: the resize knows its weights to 1e-5, which moves gradients by up to
7e-5 of themselves on any processor; rounding to bfloat16 anywhere would move them by more than 1e-3."""


@pytest.fixture(scope="module")
def golden() -> Tensors:
    return CASE.tensors


@pytest.fixture(scope="module")
def case() -> Record:
    return CASE.record


@pytest.fixture(scope="module")
def reward_case() -> Record:
    """What the small reward was, which another case tells."""
    return GoldenCase("image_reward_small").record


@pytest.fixture(scope="module")
def prompts(reward_case: Record, case: Record) -> list[str]:
    """What the reward was asked about; their token ids are compared in a test."""
    return reward_case["prompts"][: case["hyperparameters"]["batch"]]


@pytest.fixture(scope="module")
def reward(reward_case: Record) -> ImageReward:
    """The small network in the official layout; frozen."""
    path = GOLDEN / "image_reward_small_weights.safetensors"
    return ImageReward.from_official(path, image_reward_config(reward_case), reward_case["vocab"])


@pytest.fixture
def golden_policy(case: Record, pipeline_dir: Path) -> DiffusionPolicy:
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
        scheduler=diffusers.DDPMScheduler.from_config(dict(case["scheduler"]["config"])),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return DiffusionPolicy(pipeline, train="full", device="cpu")


class RecordedNoise(SampleNoise):
    """The noises of the golden case in their order, in place of a policy's own."""

    def __init__(self, golden: Tensors) -> None:
        self.noises: Iterator[Tensor] = iter([golden["initial_latents"], *golden["step_noises"]])

    def draw(self) -> Tensor:
        return next(self.noises)


def encoded(golden: Tensors) -> Conditioning:
    """The golden embeddings, of two prompts."""
    return Conditioning(("first", "second"), golden["encoder_hidden_states"])


@pytest.fixture
def recorded(golden: Tensors, golden_policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch) -> DiffusionPolicy:
    """The golden policy, which draws the golden noises and encodes any two prompts as the golden embeddings."""
    monkeypatch.setattr(golden_policy, "_noise", lambda *_: RecordedNoise(golden))
    monkeypatch.setattr(golden_policy, "encode", lambda _: encoded(golden))
    return golden_policy


@pytest.fixture
def exact(
    recorded: DiffusionPolicy, reward: ImageReward, in_double: Callable[[DiffusionPolicy], DiffusionPolicy]
) -> tuple[DiffusionPolicy, ImageReward]:
    """The same policy and the reward in float64."""
    return in_double(recorded), copy.deepcopy(reward).double()


@pytest.fixture
def settings(case: Record) -> ReFLConfig:
    """The authors' settings with the golden graded step, and without the pretraining term that their code lacks."""
    hyper = case["hyperparameters"]
    return ReFLConfig(
        batch_size=hyper["batch"],
        micro_batch_size=hyper["batch"],
        steps=hyper["num_steps"],
        first_reward_step=hyper["mid_timestep_index"],
        last_reward_step=hyper["mid_timestep_index"],
        reward_margin=float(hyper["threshold"]),
        reward_scale=hyper["grad_scale"],
        pretraining_weight=0.0,
    )


@pytest.fixture
def make_run_config(case: Record, tmp_path: Path) -> Callable[[], TrainingConfig]:
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


def assert_close(ours: Tensor, golden: Tensor, tolerance: str) -> None:
    """Compares by the absolute tolerance that the case states for something."""
    (atol,) = CASE.tolerance(tolerance)
    torch.testing.assert_close(ours, golden.to(ours.dtype), rtol=0, atol=atol)


def assert_close_gradient(ours: Tensor, golden: Tensor) -> None:
    """Compares to a part of the largest entry."""
    (part,) = CASE.tolerance("grad")
    torch.testing.assert_close(ours, golden.to(ours.dtype), rtol=0, atol=part * float(golden.abs().max()))


def assert_updated(policy: DiffusionPolicy, golden: Tensors, case: Record) -> None:
    """Compares the weights after one step of AdamW, to a part of the learning rate."""
    (part,) = CASE.tolerance("updated")
    weights = policy.trainable_state()
    for name, expected in golden.under("updated/").items():
        atol = part * case["hyperparameters"]["learning_rate"]
        torch.testing.assert_close(weights[name], expected.to(weights[name].dtype), rtol=0, atol=atol)


def before_clamp(policy: DiffusionPolicy) -> list[Tensor]:
    """A list that gets every decoded batch as it is before the clamp to [0, 1]."""
    found: list[Tensor] = []
    policy.vae.decoder.register_forward_hook(lambda _, __, output: found.append(output.detach() / 2 + 0.5))
    return found


def test_default_settings_are_the_authors(case: Record, make_run_config: Callable[[], TrainingConfig]) -> None:
    hyper, config = case["hyperparameters"], ReFLConfig()
    assert config.steps == hyper["num_steps"]
    assert [config.first_reward_step, config.last_reward_step] == hyper["official_index_range_inclusive"]
    assert config.reward_margin == hyper["threshold"]
    assert config.reward_scale == hyper["grad_scale"]
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], make_run_config())
    (group,) = optimizer.param_groups
    betas = "/".join(map(str, group["betas"]))
    assert hyper["optimizer"].startswith(f"{type(optimizer).__name__}, betas {betas}, ")
    assert numbers(hyper["optimizer"]) == [group["eps"]]


def test_timesteps_are_the_golden_ones(golden_policy: DiffusionPolicy, golden: Tensors, case: Record) -> None:
    hyper, scheduler = case["hyperparameters"], case["scheduler"]
    timesteps = golden_policy.plan(hyper["num_steps"]).timesteps
    assert torch.equal(timesteps, golden["timesteps"])
    assert timesteps[hyper["mid_timestep_index"]] == hyper["graded_timestep"]
    first, last = scheduler["first_timesteps"], scheduler["last_timesteps"]
    assert (timesteps[: len(first)].tolist(), timesteps[-len(last) :].tolist()) == (first, last)
    for name in ("timestep_spacing", "prediction_type", "clip_sample"):
        assert golden_policy.scheduler_config[name] == scheduler[name], name


def test_token_ids_of_the_reward_are_the_golden_ones(reward: ImageReward, prompts: list[str], golden: Tensors) -> None:
    tokens = reward.tokenizer(prompts, reward.config.max_length)
    assert torch.equal(tokens.ids, golden["rm_input_ids"])
    assert torch.equal(tokens.mask, golden["rm_attention_mask"])


def test_rollout_with_the_golden_noises_is_the_golden_rollout(
    golden_policy: DiffusionPolicy, golden: Tensors, case: Record
) -> None:
    hyper = case["hyperparameters"]
    latents, conditioning = golden["initial_latents"], encoded(golden)
    assert latents.shape == (hyper["batch"], 4, *hyper["latent_size"])
    assert len(golden["step_noises"]) == hyper["mid_timestep_index"]
    states = []
    with torch.no_grad():
        for step, noise in enumerate(golden["step_noises"]):
            latents = golden_policy.denoise(
                latents, conditioning, step=step, steps=hyper["num_steps"], guidance=UNGUIDED, eta=1.0, noise=noise
            )
            states.append(latents)
    for step, name in ((0, "after_step0"), (9, "after_step9"), (-1, "before_graded_step")):
        assert_close(states[step], golden[f"latents_{name}"], "latents_before_graded_step")


def test_hinge_of_golden_rewards(golden: Tensors, settings: ReFLConfig) -> None:
    (rtol,) = CASE.tolerance("loss")
    rewards = golden["loss_only/rewards"].clone().requires_grad_()
    loss = settings.reward_scale * hinge(rewards, margin=settings.reward_margin).mean()
    torch.testing.assert_close(loss, golden["loss_only/loss"], rtol=rtol, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, rewards)[0], golden["loss_only/grad"], rtol=rtol, atol=0)


def test_graded_step_is_the_golden_one(
    golden_policy: DiffusionPolicy,
    golden: Tensors,
    case: Record,
    reward: ImageReward,
    prompts: list[str],
    settings: ReFLConfig,
) -> None:
    latents, conditioning = golden["latents_before_graded_step"], encoded(golden)
    graded, steps = settings.first_reward_step, settings.steps
    with torch.no_grad():
        timesteps = golden_policy.plan(steps).timesteps[graded].expand(len(latents))
        prediction = golden_policy.predict_noise(latents, timesteps, conditioning)
        clean = golden_policy.predict_clean(latents, conditioning, step=graded, steps=steps, guidance=UNGUIDED)
        images = golden_policy.decode(clean)
        pixels = normalise(resize_and_crop(images, reward.config.image_size))
        rewards = reward(images, prompts)
    assert_close(prediction, golden["noise_pred_graded"], "pred_x0")
    assert_close(clean, golden["pred_x0"], "pred_x0")
    assert_close(clean, golden["vae_input"] * case["vae_config"]["scaling_factor"], "pred_x0")
    assert_close(images[: len(golden["image"])], golden["image"], "image")
    crop = pixels[:, :, 96:128, 96:128]  # where it was cut, the tensor's description says
    assert_close(crop, golden["preprocessed_image_crop"], "preprocessed_image_crop")
    means = golden["preprocessed_image_mean_per_channel"]
    assert_close(pixels.mean(dim=(2, 3)), means, "preprocessed_image_crop")
    assert_close(rewards, golden["rewards"], "rewards")
    (rtol,) = CASE.tolerance("loss")
    loss = settings.reward_scale * hinge(rewards, margin=settings.reward_margin).mean()
    torch.testing.assert_close(loss, golden["loss"], rtol=rtol, atol=0)


def test_gradient_and_update_of_the_graded_images_are_the_golden_ones(
    exact: tuple[DiffusionPolicy, ImageReward],
    golden: Tensors,
    case: Record,
    prompts: list[str],
    settings: ReFLConfig,
    make_run_config: Callable[[], TrainingConfig],
) -> None:
    policy, reward = exact
    unclamped = before_clamp(policy)
    images = one_step_images(policy, prompts, [0, 1], settings, reward_step=settings.first_reward_step)
    assert images.dtype == torch.float64
    assert_close(images[: len(golden["image"])].detach(), golden["image"], "image")
    clamped = torch.cat(unclamped) != images.detach()
    assert float(clamped.double().mean()) == pytest.approx(
        case["fraction_of_clamped_pixels"], rel=0, abs=0.5 / images.numel()
    )
    (rtol,) = CASE.tolerance("loss")
    loss = settings.reward_scale * hinge(reward(images, prompts), margin=settings.reward_margin).mean()
    torch.testing.assert_close(loss.detach(), golden["loss"].double(), rtol=rtol, atol=0)
    loss.backward()

    grads = gradients_of(policy, case["parameter_names"])
    for name, expected in golden.under("grad/").items():
        assert_close_gradient(grads[name], expected)
    absolute, relative = CASE.tolerance("grad_norm_per_parameter")
    norms = torch.stack([grad.norm() for grad in grads.values()])
    torch.testing.assert_close(
        norms,
        golden["grad_norm_per_parameter"].double(),
        rtol=relative,
        atol=absolute * float(golden["grad_norm_total"]),
    )
    squares: dict[str, float] = defaultdict(float)
    for name, norm in zip(grads, norms.tolist(), strict=True):
        group = ".".join(name.split(".")[: 2 if name.startswith(("down_blocks", "up_blocks")) else 1])
        squares[group] += norm**2
    (relative,) = CASE.tolerance("grad_norm_per_group")
    assert {group: square**0.5 for group, square in squares.items()} == pytest.approx(
        dict(case["grad_norm_per_group"]), rel=relative
    )

    optimizer = make_optimizer(policy.trainable_parameters(), make_run_config())
    norm = nn.utils.clip_grad_norm_(policy.trainable_parameters(), make_run_config().max_grad_norm)
    (rtol,) = CASE.tolerance("grad_norm_total")
    torch.testing.assert_close(norm, golden["grad_norm_total"].double(), rtol=rtol, atol=0)
    assert_close_gradient(grads["conv_out.weight"], golden["grad_clipped/conv_out.weight"])
    optimizer.step()
    assert_updated(policy, golden, case)


def test_whole_iteration_of_the_trainer_is_the_golden_one(
    exact: tuple[DiffusionPolicy, ImageReward],
    golden: Tensors,
    case: Record,
    prompts: list[str],
    settings: ReFLConfig,
    make_run_config: Callable[[], TrainingConfig],
) -> None:
    policy, reward = exact
    trainer = ReFLTrainer(policy, reward, prompts, settings)
    with TrainingRun(policy, make_run_config()) as run:
        metrics = trainer.step(run)
    assert metrics.reward_step == case["hyperparameters"]["mid_timestep_index"]
    (tolerance,) = CASE.tolerance("rewards")
    assert metrics.reward == pytest.approx(float(golden["rewards"].mean()), rel=0, abs=tolerance)
    (tolerance,) = CASE.tolerance("loss")
    assert metrics.reward_loss * settings.reward_scale == pytest.approx(float(golden["loss"]), rel=tolerance, abs=0)
    (tolerance,) = CASE.tolerance("grad_norm_total")
    assert metrics.grad_norm == pytest.approx(float(golden["grad_norm_total"]), rel=tolerance, abs=0)
    assert_updated(policy, golden, case)


def test_gradient_in_float32_is_that_in_float64_through_pixels_off_the_clamp(
    recorded: DiffusionPolicy,
    case: Record,
    reward: ImageReward,
    prompts: list[str],
    settings: ReFLConfig,
    request: pytest.FixtureRequest,
) -> None:
    certain: list[Tensor] = []

    def gradients(policy: DiffusionPolicy, reward: ImageReward) -> dict[str, Tensor]:
        unclamped = before_clamp(policy)
        policy.unet.zero_grad()
        images = one_step_images(policy, prompts, [0, 1], settings, reward_step=settings.first_reward_step)
        if not certain:
            pixels = torch.cat(unclamped)
            certain.append((pixels.abs() > CERTAIN) & ((pixels - 1).abs() > CERTAIN))
        images.register_hook(lambda gradient: gradient * certain[0])
        (settings.reward_scale * hinge(reward(images, prompts), margin=settings.reward_margin).mean()).backward()
        return {name: gradient.clone() for name, gradient in gradients_of(policy, case["parameter_names"]).items()}

    single = gradients(recorded, reward)
    assert certain[0].double().mean() > 0.99  # nearly all of the image still counts
    double = gradients(*request.getfixturevalue("exact"))
    total = float(torch.stack([gradient.norm() for gradient in double.values()]).norm())
    for name, gradient in double.items():
        assert single[name].dtype == torch.float32
        # Some biases of the attention have no gradient but rounding.
        assert float((single[name] - gradient).norm()) <= SINGLE * float(gradient.norm()) + 1e-5 * total, name


def gradients_of(policy: DiffusionPolicy, names: Sequence[str]) -> dict[str, Tensor]:
    """The gradient of every parameter of the UNet, which are these in this order."""
    grads = {name: parameter.grad for name, parameter in policy.unet.named_parameters() if parameter.grad is not None}
    assert list(grads) == list(names)
    return grads
