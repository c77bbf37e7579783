from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, LoRAConfig, SampleNoise, Trajectory

PROMPTS = ["a red circle", "a photo of a cat"]
SEEDS = [11, 12]
STEPS = 5
CFG = ClassifierFree(3.0)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either(request: pytest.FixtureRequest) -> DiffusionPolicy:
    return request.getfixturevalue("policy" if request.param == "epsilon" else "v_policy")


def noises(seeds: list[int], count: int) -> list[Tensor]:
    noise = SampleNoise(seeds, (4, 8, 8), torch.device("cpu"))
    return [noise.draw() for _ in range(count)]


def pairs(trajectory: Trajectory, step: int) -> tuple[Tensor, Tensor]:
    """All samples at one step."""
    samples = torch.arange(len(trajectory.latents))
    return samples, torch.full_like(samples, step)


# Against diffusers.


@torch.no_grad()
def diffusers_loop(policy: DiffusionPolicy, conditioning: Conditioning, *, eta: float, scale: float) -> Tensor:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(policy.scheduler_config)
    scheduler.set_timesteps(STEPS)
    latents, *rest = noises(SEEDS, 1 + STEPS)
    both = torch.cat([policy.encode(["", ""]).tokens, conditioning.tokens])
    for timestep, noise in zip(scheduler.timesteps, rest, strict=True):
        output = policy.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=both).sample
        away, towards = output.chunk(2)
        guided = away + scale * (towards - away)
        step = scheduler.step(guided, timestep, latents, eta=eta, variance_noise=noise if eta else None)
        latents = step.prev_sample
    return latents


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_agrees_with_the_ddim_of_diffusers(either: DiffusionPolicy, eta: float) -> None:
    conditioning = either.encode(PROMPTS)
    latents = either.sample(conditioning, steps=STEPS, guidance=CFG, eta=eta, seeds=SEEDS)
    expected = diffusers_loop(either, conditioning, eta=eta, scale=3.0)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_drawing_agrees_with_the_pipeline_of_diffusers(either: DiffusionPolicy) -> None:
    from diffusers import DDIMScheduler

    pipeline = either.to_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=5.0, latents=noises(SEEDS, 1)[0], output_type="pt"
    ).images
    images = either.draw(PROMPTS, steps=STEPS, seeds=SEEDS)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


# Seeds and parts of a rollout.


def test_same_seeds_give_the_same_images(policy: DiffusionPolicy) -> None:
    first, second = (policy.draw(PROMPTS, steps=3, seeds=SEEDS, eta=1.0) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, policy.draw(PROMPTS, steps=3, seeds=[11, 13], eta=1.0))


def test_drawing_in_batches_gives_the_same_images(policy: DiffusionPolicy) -> None:
    texts, seeds = [*PROMPTS, "a dog"], [1, 2, 3]
    whole = policy.draw(texts, steps=3, seeds=seeds, eta=1.0)
    parts = policy.draw(texts, steps=3, seeds=seeds, eta=1.0, batch_size=2)
    # The noise is the same to the last bit; the network rounds differently in another batch.
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_partial_rollout_is_the_beginning_of_the_whole(policy: DiffusionPolicy, eta: float) -> None:
    conditioning = policy.encode(PROMPTS)
    whole = policy.sample(conditioning, steps=STEPS, guidance=CFG, eta=eta, seeds=SEEDS)
    latents = policy.sample(conditioning, steps=STEPS, guidance=CFG, eta=eta, seeds=SEEDS, until=3)
    rest = noises(SEEDS, 1 + STEPS)[4:]
    with torch.no_grad():
        for step, noise in zip((3, 4), rest, strict=True):
            given = noise if eta else None
            latents = policy.denoise(latents, conditioning, step=step, steps=STEPS, guidance=CFG, eta=eta, noise=given)
    assert torch.equal(latents, whole)
    assert torch.equal(policy.sample(conditioning, steps=STEPS, guidance=CFG, eta=eta, seeds=SEEDS, until=STEPS), whole)


def test_sampling_goes_on_from_what_others_have_drawn(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    whole = policy.sample(conditioning, steps=STEPS, guidance=CFG, seeds=SEEDS)
    half = policy.sample(conditioning, steps=STEPS, guidance=CFG, seeds=SEEDS, until=3)
    other = [5, 6]  # of noises that are not needed
    rest = policy.sample(conditioning, steps=STEPS, guidance=CFG, seeds=other, latents=half, start=3)
    assert torch.equal(rest, whole)
    assert torch.equal(policy.sample(conditioning, steps=STEPS, seeds=other, latents=half, start=STEPS), half)
    assert torch.equal(policy.sample(conditioning, steps=STEPS, seeds=other, latents=half, start=2, until=2), half)
    noise = policy.sample(conditioning, steps=STEPS, seeds=SEEDS, until=0)
    assert torch.equal(policy.sample(conditioning, steps=STEPS, guidance=CFG, seeds=other, latents=noise), whole)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"until": STEPS + 1}, "until must be from 0 to steps=5, got 6"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"start": STEPS + 1}, "start must be from 0 to 5, where sampling ends, got 6"),
        ({"start": 3, "until": 2}, "start must be from 0 to 2, where sampling ends, got 3"),
        ({"start": 1}, "latents must be given with start=1, got None"),
    ],
)
def test_steps_that_there_are_not_cannot_be_taken(policy: DiffusionPolicy, span: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.sample(policy.encode(PROMPTS), steps=STEPS, seeds=SEEDS, **span)


def test_another_image_size(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    assert policy.sample(conditioning, steps=2, seeds=SEEDS, height=32, width=96).shape == (2, 4, 4, 12)
    assert policy.rollout(conditioning, steps=2, seeds=SEEDS, height=32).latents.shape == (2, 3, 4, 4, 8)
    assert (policy.image_size, policy.sample_size) == (64, 8)


# Trajectories and log-probabilities.


def test_rollout_ends_where_sampling_ends(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    trajectory = policy.rollout(conditioning, steps=STEPS, guidance=CFG, eta=1.0, seeds=SEEDS)
    assert trajectory.latents.shape == (2, STEPS + 1, 4, 8, 8)
    assert trajectory.log_probs.shape == (2, STEPS)
    assert torch.equal(trajectory.timesteps, policy.plan(STEPS).timesteps)
    assert torch.equal(trajectory.latents[:, 0], noises(SEEDS, 1)[0])
    final = policy.sample(conditioning, steps=STEPS, guidance=CFG, eta=1.0, seeds=SEEDS)
    assert torch.equal(trajectory.latents[:, -1], final)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_is_exactly_one_before_the_first_update(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> None:
    policy = make_policy(lora=LoRAConfig(), dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    stir(policy)
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=3, guidance=CFG, eta=0.7, seeds=SEEDS)
    assert (trajectory.latents.dtype, trajectory.log_probs.dtype) == (torch.float32, torch.float64)
    if dtype != torch.float32:
        for state in trajectory.latents.unbind(dim=1):
            assert not torch.equal(state, state.to(dtype).float())  # what is stored was not rounded
    for step in range(3):
        log_prob = policy.log_prob(trajectory, *pairs(trajectory, step), guidance=CFG, eta=0.7)
        assert log_prob.requires_grad
        assert torch.equal((log_prob - trajectory.log_probs[:, step]).exp(), torch.ones(2).double())


def test_ratio_of_a_v_prediction_policy_is_exactly_one(v_policy: DiffusionPolicy) -> None:
    trajectory = v_policy.rollout(v_policy.encode(PROMPTS), steps=3, seeds=SEEDS)
    for step in range(3):
        log_prob = v_policy.log_prob(trajectory, *pairs(trajectory, step))
        assert torch.equal(log_prob, trajectory.log_probs[:, step])


def test_pairs_of_any_sample_and_step_have_the_stored_log_prob(policy: DiffusionPolicy) -> None:
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=STEPS, guidance=CFG, seeds=SEEDS)
    samples, steps = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([4, 0, 0, 2, 3])
    log_prob = policy.log_prob(trajectory, samples, steps, guidance=CFG)
    # Another shape than the rollout's may round differently.
    torch.testing.assert_close(log_prob, trajectory.log_probs[samples, steps], rtol=0, atol=1e-5)


def test_gradient_of_log_prob_reaches_all_trained_weights_and_no_others(
    policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]
) -> None:
    stir(policy)
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=2, seeds=SEEDS)
    stir(policy)
    policy.log_prob(trajectory, *pairs(trajectory, 1)).sum().backward()
    trained = {id(parameter) for parameter in policy.trainable_parameters()}
    for network in (policy.unet, policy.vae, policy.text_encoder):
        for name, parameter in network.named_parameters():
            if id(parameter) in trained:
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name
            else:
                assert parameter.grad is None, name


def test_a_step_along_the_gradient_raises_the_log_prob(policy: DiffusionPolicy) -> None:
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=2, seeds=SEEDS)
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=0.05)
    loss = -policy.log_prob(trajectory, *pairs(trajectory, 0)).mean()
    loss.backward()
    optimizer.step()
    assert -policy.log_prob(trajectory, *pairs(trajectory, 0)).mean() < loss


# One step, differentiable.


def test_clean_prediction_is_what_the_last_noise_leaves(either: DiffusionPolicy) -> None:
    clean, noise = noises([1, 2], 1)[0], noises([3, 4], 1)[0]
    conditioning = either.encode(PROMPTS)
    timesteps = either.plan(STEPS).timesteps[2].expand(2)
    noised = either.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        predicted = either.predict_clean(noised, conditioning, step=2, steps=STEPS, guidance=ClassifierFree(1.0))
        epsilon = either.predict_noise(noised, timesteps, conditioning)
    torch.testing.assert_close(either.add_noise(predicted, epsilon, timesteps), noised, rtol=1e-5, atol=1e-5)


def test_default_guidance_is_classifier_free_of_five(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    plain = policy.sample(conditioning, steps=2, seeds=SEEDS)
    assert torch.equal(plain, policy.sample(conditioning, steps=2, seeds=SEEDS, guidance=ClassifierFree(5.0)))
    assert not torch.equal(plain, policy.sample(conditioning, steps=2, seeds=SEEDS, guidance=ClassifierFree(1.0)))


def test_image_of_one_step_is_differentiable_in_the_trained_weights(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    latents = policy.sample(conditioning, steps=4, seeds=SEEDS, until=3)
    assert not latents.requires_grad
    latents = policy.denoise(latents, conditioning, step=2, steps=4)
    images = policy.decode(policy.predict_clean(latents, conditioning, step=3, steps=4))
    images.mean().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    frozen = [*policy.vae.parameters(), *policy.text_encoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_checkpointing_changes_no_gradient(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    gradients = []
    for switch in (False, True):
        policy = make_policy(lora=LoRAConfig(), gradient_checkpointing=switch)
        stir(policy)
        conditioning = policy.encode(PROMPTS)
        latents = policy.sample(conditioning, steps=4, seeds=SEEDS, until=3)
        policy.decode(policy.predict_clean(latents, conditioning, step=3, steps=4)).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
        assert policy.unet.is_gradient_checkpointing is switch
        assert policy.vae.is_gradient_checkpointing is switch
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


# Images and latents.


def test_images_are_decoded_in_chunks(policy: DiffusionPolicy) -> None:
    sizes: list[int] = []
    policy.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, chunked = policy.decode(latents), policy.decode(latents, chunk=2)
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-5)
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_encoded_images_are_the_scaled_posterior(policy: DiffusionPolicy) -> None:
    images = torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = policy.vae.encode(images * 2 - 1).latent_dist
    scale = policy.vae.config["scaling_factor"]
    torch.testing.assert_close(policy.encode_images(images), posterior.mean * scale)
    sampled = policy.encode_images(images, seeds=[3, 4, 5], chunk=2)
    noise = SampleNoise([3, 4, 5], (4, 4, 8), policy.device).draw()
    # In chunks the VAE rounds differently.
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise) * scale, rtol=1e-4, atol=1e-5)


def test_denoising_loss_is_the_error_of_the_networks_own_prediction(either: DiffusionPolicy) -> None:
    latents = noises(SEEDS, 1)[0]
    conditioning = either.encode(PROMPTS)
    timesteps = torch.tensor([17, 803])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = either.denoising_loss(latents, conditioning, timesteps, noise)
    alphas = either.process.levels(timesteps).view(-1, 1, 1, 1)
    noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    target = (
        noise if either.process.prediction_type == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    )
    output = either.unet(noised, timesteps, encoder_hidden_states=conditioning.tokens).sample
    torch.testing.assert_close(loss, (output - target).square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    assert all(parameter.grad is not None for parameter in either.trainable_parameters())


# Numbers out of bounds.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"until": 6}, "until must be from 0 to steps=5, got 6"),
        ({"until": -1}, "until must be at least 0, got -1"),
        ({"eta": 1.5}, "eta must be at most 1, got 1.5"),
        ({"seeds": [1]}, "seeds must be one for each of the 2 samples, got 1"),
        ({"height": 60}, "height must be a positive multiple of the VAE's factor 8, got 60"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_sampling_refuses_what_is_out_of_bounds(policy: DiffusionPolicy, options: dict[str, Any], message: str) -> None:
    policy.network = lambda *args, **rest: pytest.fail("the network ran")
    given: dict[str, Any] = {"steps": STEPS, "seeds": SEEDS} | options
    with pytest.raises(ValueError, match=message):
        policy.sample(policy.encode(PROMPTS), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "step must be from 0 to 4, the last of 5 steps, got 5"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"eta": 1.0}, "noise must be given with eta=1.0, got None"),
        ({"eta": -0.1}, "eta must be at least 0, got -0.1"),
    ],
)
def test_a_step_refuses_what_is_out_of_bounds(policy: DiffusionPolicy, options: dict[str, Any], message: str) -> None:
    latents = noises(SEEDS, 1)[0]
    given: dict[str, Any] = {"step": 0, "steps": STEPS} | options
    with pytest.raises(ValueError, match=message):
        policy.denoise(latents, policy.encode(PROMPTS), **given)


def test_clean_prediction_refuses_a_step_out_of_bounds(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="step must be from 0 to 4, the last of 5 steps, got 7"):
        policy.predict_clean(noises(SEEDS, 1)[0], policy.encode(PROMPTS), step=7, steps=STEPS)


def test_deterministic_steps_have_no_log_prob(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS)
    with pytest.raises(ValueError, match="eta must be above 0 for log-probabilities"):
        policy.rollout(conditioning, steps=STEPS, eta=0.0, seeds=SEEDS)
    policy.scheduler_config["timestep_spacing"] = "linspace"
    with pytest.raises(ValueError, match=r"must start above timestep 0 .* timestep_spacing='linspace'"):
        policy.rollout(conditioning, steps=STEPS, eta=1.0, seeds=SEEDS)


def test_other_numbers_out_of_bounds_are_refused(policy: DiffusionPolicy) -> None:
    latents = noises(SEEDS, 1)[0]
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        policy.decode(latents, chunk=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        policy.draw(PROMPTS, seeds=SEEDS, batch_size=0)
    with pytest.raises(ValueError, match="seeds must be one for each of the 2 samples, got 3"):
        policy.draw(PROMPTS, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="width must be a positive multiple of the VAE's factor 8, got 60"):
        policy.encode_images(torch.zeros(1, 3, 64, 60))
    with pytest.raises(ValueError, match="seeds must be one for each of the 1 samples, got 2"):
        policy.encode_images(torch.zeros(1, 3, 64, 64), seeds=SEEDS)


# Switches that need a machine of their own.


def test_compile_switch_compiles_the_unet_in_place(
    make_policy: Callable[..., DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compiled(function: Callable[..., Any], *args: Any, **rest: Any) -> Callable[..., Any]:
        def call(*inner: Any, **named: Any) -> Any:
            calls.append(1)
            return function(*inner, **named)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    policy = make_policy(compile=True)
    policy.sample(policy.encode(PROMPTS), steps=2, seeds=SEEDS)
    assert len(calls) == 2
    assert policy.network is policy.unet


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles C++ where there is no accelerator
def test_compiled_policy_draws_the_same(make_policy: Callable[..., DiffusionPolicy]) -> None:
    plain, compiled = make_policy(lora=LoRAConfig()), make_policy(lora=LoRAConfig(), compile=True)
    images = plain.draw(PROMPTS, steps=3, seeds=SEEDS)
    torch.testing.assert_close(compiled.draw(PROMPTS, steps=3, seeds=SEEDS), images, rtol=0, atol=1e-4)
    with compiled.reference():
        torch.testing.assert_close(compiled.draw(PROMPTS, steps=3, seeds=SEEDS), images, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_no_step_of_sampling_waits_for_the_accelerator(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(lora=LoRAConfig()).to("cuda")
    conditioning = policy.encode(PROMPTS)
    policy.rollout(conditioning, steps=STEPS, seeds=SEEDS)  # copies the schedule and the empty prompt there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.rollout(conditioning, steps=STEPS, seeds=SEEDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
