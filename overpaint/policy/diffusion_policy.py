"""The policy: a Stable Diffusion as a decision process.

A state is (prompt, timestep, latents), an action the next latents, drawn from a Gaussian whose mean the UNet gives and
whose standard deviation the noise schedule gives. Everything that is particular to this family of models stays in this
package.

What was left out: samplers other than DDIM (of which ancestral DDPM sampling is eta = 1), safety checkers, training of
the text encoder or the VAE.
"""

import copy
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import autoencoder, ddim
from .added import added_networks
from .ddim import PredictionType, Schedule
from .guidance import DEFAULT_GUIDANCE, ClassifierFree, Guidance, SamplingGuard, StepContext
from .loading import check_pipeline, load_pipeline
from .noise import SampleNoise, draw_noise
from .parts import Pipeline
from .prompts import PromptEncoder, check_prompts
from .saving import load_lora, plain_pipeline, save_lora
from .trained import TrainedWeights
from .types import Embeddings, Images, Latents, PerSample, Trajectory
from .weights import LoRAConfig, merge_lora


class DiffusionPolicy:
    """Draws images from prompts, tells how likely its steps were, and carries the weights that are trained.

    Latents are float32 everywhere; only what goes into a network is rounded to its precision. Stored trajectories are
    therefore exact, and the log-probability of a step is that of the very latents that were stored.

    Args:
        pipeline: Its networks become the policy's; all are frozen but for what `lora` or `train` names.
        lora: Trains a fresh low-rank adapter on the UNet.
        train: Trains a named set of the UNet's own parameters, see `PARAMETER_SETS`. Only without `lora`.
        device: Where to put the networks; None is this process's GPU, or the CPU where there is none.
        gradient_checkpointing: Recomputes activations of UNet and VAE in the backward pass instead of keeping them.
        compile: Compiles the UNet with `torch.compile`.

    Raises:
        ValueError: The pipeline is not a Stable Diffusion, or the options contradict each other.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        lora: LoRAConfig | None = None,
        train: str | None = None,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        check_pipeline(pipeline)
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self.scheduler_config: dict[str, Any] = dict(pipeline.scheduler.config)
        self.prediction_type = cast(PredictionType, self.scheduler_config.get("prediction_type", "epsilon"))
        self.prompts = PromptEncoder(self.text_encoder, self.tokenizer)
        self.guard: SamplingGuard | None = None
        """What keeps something out of pictures by changing how they are sampled, if anything does."""
        self._schedules: dict[tuple[int, torch.device], Schedule] = {}
        self._alphas = ddim.cumulative_alphas(self.scheduler_config)
        self.freeze()
        self._trained = TrainedWeights(self.unet, lora, train)
        self.to(_default_device() if device is None else torch.device(device))
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        if compile:
            self.unet.compile()
        self.network: Callable[..., Any] = self.unet
        """What every call of the UNet goes through; a training run puts its wrapper here."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        lora: LoRAConfig | None = None,
        train: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> "DiffusionPolicy":
        """Loads a checkpoint that diffusers loads as `StableDiffusionPipeline`.

        Args:
            path: A folder in diffusers' layout, or a hub id such as "CompVis/stable-diffusion-v1-4".
            lora: See the class.
            train: See the class.
            dtype: Precision of all frozen weights, whatever precision the files have.
            device: See the class.
            gradient_checkpointing: See the class.
            compile: See the class.

        Raises:
            ValueError: There is no such checkpoint, it is of another kind (SDXL, inpainting), or the options
                contradict each other.
        """
        return cls(
            load_pipeline(path, dtype),
            lora=lora,
            train=train,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Pipeline,
        *,
        lora: LoRAConfig | None = None,
        train: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> "DiffusionPolicy":
        """Makes a policy of a pipeline in memory, whose networks it takes over; options as in `from_pretrained`.

        Raises:
            ValueError: The pipeline is not a Stable Diffusion, or the options contradict each other.
        """
        check_pipeline(pipeline)
        for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            if network.dtype != dtype:
                network.to(dtype=dtype)
        return cls(
            pipeline,
            lora=lora,
            train=train,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )

    # Where and how large.

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device  # unet.device looks through every module each time it is asked

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet's frozen weights, which a LoRA in float32 does not change."""
        return self.unet.conv_in.weight.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of the image for one of the latents, along each side."""
        return autoencoder.scale_factor(self.vae)

    @property
    def sample_size(self) -> int:
        """Side of the latents that the UNet was trained on."""
        return int(self.unet.config.sample_size)

    @property
    def image_size(self) -> int:
        """Side of the images that the UNet was trained on, in pixels."""
        return self.sample_size * self.vae_scale_factor

    def to(self, device: str | torch.device) -> "DiffusionPolicy":
        """Moves the networks to a device and returns the policy."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device)
        return self

    # Prompts and images in and out.

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Returns the embeddings of prompts; each prompt goes through the text encoder once, and without gradient.

        Raises:
            ValueError: There is no prompt, or one is not a string.
        """
        return self.prompts(prompts)

    def decode(self, latents: Latents, *, chunk: int = autoencoder.CHUNK) -> Images:
        """Returns images of latents, clamped to [0, 1]; gradients flow to the latents where they are enabled.

        Args:
            latents: As `sample` and `predict_clean` give them.
            chunk: How many go through the VAE at a time.
        """
        return autoencoder.decode(self.vae, latents, chunk=chunk)

    def encode_images(
        self, images: Images, *, seeds: Sequence[int] | None = None, chunk: int = autoencoder.CHUNK
    ) -> Latents:
        """Returns the latents of images, without gradient.

        Args:
            images: Sides must be multiples of the VAE's factor.
            seeds: One for each image, to draw from the VAE's posterior; None takes its mean.
            chunk: How many go through the VAE at a time.

        Raises:
            ValueError: A side does not divide by the VAE's factor, or there are not as many seeds as images.
        """
        size = self._latent_size(images.shape[-2], images.shape[-1])
        noise = None if seeds is None else self._noise(seeds, len(images), *size).draw
        return autoencoder.encode(self.vae, images, noise=noise, chunk=chunk)

    # The network.

    def predict_noise(
        self,
        latents: Latents,
        timesteps: Int[Tensor, " batch"],
        embeddings: Embeddings,
        guidance: Guidance | None = None,
        *,
        steps: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """Returns the noise that the UNet sees in latents, whatever kind of prediction it makes.

        Args:
            latents: Noised latents.
            timesteps: The scheduler's integer of each sample.
            embeddings: The prompt of each sample.
            guidance: None is the prediction for the prompt alone, without guidance.
            steps: Index of the denoising step of each sample, counted from noise, for a guidance that changes on the
                way; by default its index on the grid of all training timesteps.
        """
        alphas = self.alphas[timesteps]
        context = None
        if guidance is not None:
            total = len(self._alphas)
            context = self._moment(total - 1 - timesteps if steps is None else steps, total, alphas)
        prediction = self._predict(latents, timesteps, embeddings, guidance, context)
        return ddim.predict_epsilon(latents, prediction, alphas, self.prediction_type)

    def _predict(
        self,
        latents: Latents,
        timesteps: Int[Tensor, " batch"],
        embeddings: Embeddings,
        guidance: Guidance | None,
        context: StepContext | None,
    ) -> Latents:
        """Returns the network's guided prediction, of its own kind; all branches go through it in one call."""
        if isinstance(guidance, ClassifierFree) and self.guard is not None:
            guidance = self.guard.guided(guidance)
        if isinstance(guidance, ClassifierFree) and guidance.scale == 1.0:
            guidance = None  # the same, without an encoded empty prompt
        if guidance is None:
            branches = embeddings.unsqueeze(0)
        else:
            branches = guidance.embeddings(embeddings, self.prompts.empty(embeddings), cast(StepContext, context))
        count = len(branches)
        output = self.network(
            latents.to(self.dtype).repeat(count, 1, 1, 1),
            timesteps.repeat(count),
            encoder_hidden_states=branches.flatten(0, 1).to(self.dtype),
            return_dict=False,
        )[0]
        predictions = output.float().unflatten(0, (count, len(latents)))
        if guidance is None:
            return predictions[0]
        return guidance.combine(predictions, cast(StepContext, context))

    def _moment(self, steps: Int[Tensor, " batch"], total: int, alphas: PerSample) -> StepContext:
        """Returns what a guidance may want to know of each sample's step."""
        return StepContext(steps, total, ddim.noise_scale(alphas, self.prediction_type))

    def _mean_and_std(
        self,
        latents: Latents,
        embeddings: Embeddings,
        plan: Schedule,
        steps: Int[Tensor, " batch"],
        guidance: Guidance,
        eta: float,
    ) -> tuple[Latents, PerSample]:
        """Returns the Gaussian of one step of each sample; the one path of sampling and of recomputation."""
        context = self._moment(steps, len(plan.timesteps), plan.alphas[steps])
        prediction = self._predict(latents, plan.timesteps[steps], embeddings, guidance, context)
        return ddim.ddim_mean_and_std(
            latents,
            prediction,
            plan.alphas[steps],
            plan.previous_alphas[steps],
            eta=eta,
            prediction_type=self.prediction_type,
        )

    # Sampling.

    @torch.no_grad()
    def sample(
        self,
        embeddings: Embeddings,
        *,
        steps: int = 50,
        guidance: Guidance | None = None,
        eta: float = 0.0,
        seeds: Sequence[int],
        until: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Latents:
        """Denoises from noise, without gradient.

        Args:
            embeddings: Prompts, from `encode`.
            steps: Number of denoising steps of a whole image.
            guidance: None is classifier-free guidance of 5.
            eta: Share of the noise of ancestral sampling, in [0, 1]; 0 is deterministic.
            seeds: One for each sample; the noise of a sample depends on nothing else.
            until: Stops before the step of this index; None goes to the end.
            height: Height of the image in pixels, by default the size of training.
            width: Width of the image in pixels, by default the size of training.

        Raises:
            ValueError: A number is out of its range, a side does not divide by the VAE's factor, or there are not as
                many seeds as prompts.
        """
        plan = self._schedule(steps)
        if until is not None and not 0 <= until <= steps:
            raise ValueError(f"until must be from 0 to steps={steps}, got {until}")
        _check_eta(eta)
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        noise = self._noise(seeds, len(embeddings), *self._latent_size(height, width))
        latents = noise.draw()
        for step in range(steps if until is None else until):
            mean, std = self._mean_and_std(latents, embeddings, plan, self._steps(step, latents), guidance, eta)
            latents = mean + std.view(-1, 1, 1, 1) * noise.draw() if eta > 0 else mean
        return latents

    @torch.no_grad()
    def rollout(
        self,
        embeddings: Embeddings,
        *,
        steps: int = 50,
        guidance: Guidance | None = None,
        eta: float = 1.0,
        seeds: Sequence[int],
        height: int | None = None,
        width: int | None = None,
    ) -> Trajectory:
        """Samples as `sample` does, to the end, and keeps every state and the log-probability of every step.

        Raises:
            ValueError: As `sample`, or a step would be deterministic and so have no log-probability.
        """
        plan = self._stochastic_schedule(steps, eta)
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        noise = self._noise(seeds, len(embeddings), *self._latent_size(height, width))
        states = [noise.draw()]
        log_probs = []
        for step in range(steps):
            latents = states[-1]
            mean, std = self._mean_and_std(latents, embeddings, plan, self._steps(step, latents), guidance, eta)
            states.append(mean + std.view(-1, 1, 1, 1) * noise.draw())
            log_probs.append(ddim.gaussian_log_prob(states[-1], mean, std))
        return Trajectory(torch.stack(states, dim=1), torch.stack(log_probs, dim=1), plan.timesteps, embeddings)

    def log_prob(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance | None = None,
        eta: float = 1.0,
    ) -> PerSample:
        """Returns the log-probability of stored steps under the present weights; gradients flow to the weights.

        Takes the same path as `rollout`: with unchanged weights and a minibatch of the rollout's shape, the result is
        the stored number to the last bit. Arguments are those of `stored_steps`.
        """
        return ddim.gaussian_log_prob(*self.stored_steps(trajectory, samples, steps, guidance=guidance, eta=eta))

    def stored_steps(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance | None = None,
        eta: float = 1.0,
    ) -> tuple[Latents, Latents, PerSample]:
        """Returns where stored steps led, and the Gaussians that the present weights would draw them from.

        Args:
            trajectory: From `rollout`, with the same guidance and eta; may lie on another device.
            samples: Index of the sample of each wanted pair.
            steps: Index of the step of each wanted pair, counted from noise.
            guidance: None is classifier-free guidance of 5.
            eta: As in the rollout.

        Returns:
            The latents that each step led to; the mean, with gradient where it is enabled, and the standard deviation.
        """
        plan = self._stochastic_schedule(len(trajectory.timesteps), eta)
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        where = trajectory.latents.device
        samples, steps = samples.to(where), steps.to(where)
        before = trajectory.latents[samples, steps].to(self.device)
        after = trajectory.latents[samples, steps + 1].to(self.device)
        embeddings = trajectory.embeddings[samples.to(trajectory.embeddings.device)].to(self.device)
        mean, std = self._mean_and_std(before, embeddings, plan, steps.to(self.device), guidance, eta)
        return after, mean, std

    def step_scales(self, steps: int, eta: float = 1.0) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
        """Returns the standard deviation of each step, and by how much its mean follows the network's prediction.

        Raises:
            ValueError: As `rollout`.
        """
        plan = self._stochastic_schedule(steps, eta)
        levels = plan.alphas.double(), plan.previous_alphas.double()
        blank = plan.alphas.new_zeros(steps, 4, 1, 1).double()
        _, std = ddim.ddim_mean_and_std(blank, blank, *levels, eta=eta, prediction_type=self.prediction_type)
        return std, ddim.mean_sensitivity(*levels, eta=eta, prediction_type=self.prediction_type)

    def denoise(
        self,
        latents: Latents,
        embeddings: Embeddings,
        *,
        step: int,
        steps: int = 50,
        guidance: Guidance | None = None,
        eta: float = 0.0,
        noise: Latents | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Latents:
        """Takes one step, with gradient where it is enabled.

        Args:
            latents: State before the step.
            embeddings: Prompts, from `encode`.
            step: Index of the step, counted from noise.
            steps: Number of denoising steps of a whole image.
            guidance: None is classifier-free guidance of 5.
            eta: Share of the noise of ancestral sampling, in [0, 1].
            noise: What to add, scaled by the step's standard deviation.
            generators: In place of `noise`, one for each sample to draw it from.

        Raises:
            ValueError: A number is out of its range, or eta is above 0 without exactly one of noise and generators.
        """
        plan = self._schedule(steps)
        _check_step(step, steps)
        _check_eta(eta)
        if eta > 0 and (noise is None) == (generators is None):
            raise ValueError(f"with eta={eta} exactly one of noise and generators must be given")
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        mean, std = self._mean_and_std(latents, embeddings, plan, self._steps(step, latents), guidance, eta)
        if eta == 0:
            return mean
        if noise is None:
            drawn = cast(Sequence[torch.Generator], generators)
            if len(drawn) != len(latents):
                raise ValueError(f"generators must be one for each of the {len(latents)} samples, got {len(drawn)}")
            height, width = latents.shape[-2:]
            noise = draw_noise(drawn, height=height, width=width, device=latents.device)
        return mean + std.view(-1, 1, 1, 1) * noise

    def predict_clean(
        self,
        latents: Latents,
        embeddings: Embeddings,
        *,
        step: int,
        steps: int = 50,
        guidance: Guidance | None = None,
    ) -> Latents:
        """Returns the clean latents as one call of the UNet guesses them, with gradient where it is enabled.

        Args:
            latents: State before the step.
            embeddings: Prompts, from `encode`.
            step: Index of the step, counted from noise.
            steps: Number of denoising steps of a whole image.
            guidance: None is classifier-free guidance of 5.

        Raises:
            ValueError: `step` or `steps` is out of its range.
        """
        plan = self._schedule(steps)
        _check_step(step, steps)
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        indices = self._steps(step, latents)
        context = self._moment(indices, steps, plan.alphas[indices])
        prediction = self._predict(latents, plan.timesteps[indices], embeddings, guidance, context)
        return ddim.predict_clean(latents, prediction, plan.alphas[indices], self.prediction_type)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 50,
        guidance: Guidance | None = None,
        eta: float = 0.0,
        batch_size: int = 16,
        height: int | None = None,
        width: int | None = None,
    ) -> Images:
        """Draws an image for each prompt: encodes, samples and decodes, `batch_size` at a time.

        Raises:
            ValueError: As `encode` and `sample`.
        """
        wanted = check_prompts(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        _check_seeds(seeds, len(wanted))
        images = []
        for start in range(0, len(wanted), batch_size):
            part = slice(start, start + batch_size)
            latents = self.sample(
                self.encode(wanted[part]),
                steps=steps,
                guidance=guidance,
                eta=eta,
                seeds=seeds[part],
                height=height,
                width=width,
            )
            images.append(self.decode(latents))
        return torch.cat(images)

    # Forward noising, for losses on images that exist.

    @property
    def alphas(self) -> Float[Tensor, " timesteps"]:
        """Cumulative alpha of every timestep of training, on the policy's device."""
        if self._alphas.device != self.device:
            self._alphas = self._alphas.to(self.device)
        return self._alphas

    def timesteps(self, steps: int) -> Int[Tensor, " steps"]:
        """Returns the timesteps that sampling with that many steps visits, falling, on the policy's device."""
        return self._schedule(steps).timesteps

    def add_noise(self, clean: Latents, noise: Latents, timesteps: Int[Tensor, " batch"]) -> Latents:
        """Returns clean latents noised forward to the timestep of each sample."""
        return ddim.add_noise(clean, noise, self.alphas[timesteps])

    def denoising_loss(
        self, latents: Latents, embeddings: Embeddings, timesteps: Int[Tensor, " batch"], noise: Latents
    ) -> PerSample:
        """Returns the loss of pretraining for each sample: the mean squared error of the network's own prediction.

        The error is taken of what the network predicts, noise, velocity or clean latents, without guidance: it is
        finite at every timestep, also where a schedule ends without any signal and the noise says nothing of a
        velocity. Source: Ho et al. (2020), https://arxiv.org/abs/2006.11239, equation 14.

        Args:
            latents: Clean latents.
            embeddings: The prompt of each.
            timesteps: The scheduler's integer of each, uniform over training's in pretraining.
            noise: What is added to each, from a standard normal distribution.
        """
        noised = self.add_noise(latents, noise, timesteps)
        prediction = self._predict(noised, timesteps, embeddings, None, None)
        target = ddim.prediction_target(latents, noise, self.alphas[timesteps], self.prediction_type)
        return ((prediction - target) ** 2).flatten(1).mean(dim=1)

    # Weights.

    def freeze(self) -> None:
        """Freezes every network and puts it in evaluation mode; trained parameters are then switched on one by one."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()

    @property
    def lora(self) -> LoRAConfig | None:
        """The settings of the LoRA, if there is one."""
        return self._trained.lora

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that training may change."""
        return list(self._trained.parameters.values())

    def trainable_state(self) -> dict[str, Tensor]:
        """Returns a copy of the trained weights, by their names in the UNet."""
        return self._trained.state()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave.

        Raises:
            ValueError: The names or a shape differ; nothing is changed then.
        """
        self._trained.load_state(state)

    def remember_reference(self) -> None:
        """Makes the present weights the reference policy.

        Needed after weights that are trained were changed by something that is not training, such as an erasure
        applied to a policy with `train` set. With a LoRA there is nothing to do: the reference is the UNet beneath it.
        """
        self._trained.remember()

    def student_copy(self, train: str) -> "DiffusionPolicy":
        """Returns a policy that draws the same, with a UNet of its own of which a named set is trained.

        Text encoder and VAE are shared. A LoRA is added in. The UNet is float32, as small updates need; `network` and
        gradient checkpointing are as in a new policy.

        Args:
            train: See `PARAMETER_SETS`.

        Raises:
            ValueError: There is no such set, or it is empty.
        """
        plain = plain_pipeline(self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler)
        plain.unet = copy.deepcopy(plain.unet).float()
        student = DiffusionPolicy(plain, train=train, device=self.device)
        student.prompts = self.prompts
        student.guard = self.guard
        return student

    @contextmanager
    def reference(self) -> Generator[None, None, None]:
        """Turns the policy into the one that training started from, without a second UNet and without gradients.

        A LoRA is switched off. Without one, the trained weights change places with a copy kept in the CPU's memory.
        """
        with self._trained.at_reference():
            yield

    def merge_lora(self) -> None:
        """Adds the LoRA into the UNet's own weights; nothing is trained any more afterwards.

        Raises:
            ValueError: The policy has no LoRA.
        """
        self._check_lora()
        merge_lora(self.unet)
        self._trained.forget_lora()

    def save_lora(self, folder: str | Path) -> None:
        """Saves the LoRA in diffusers' format, for `StableDiffusionPipeline.load_lora_weights(folder)`.

        Raises:
            ValueError: The policy has no LoRA.
        """
        self._check_lora()
        save_lora(self.unet, folder)

    def load_lora(self, folder: str | Path) -> None:
        """Puts weights that `save_lora` wrote into the policy's LoRA.

        Raises:
            ValueError: The policy has no LoRA, the folder holds none, or it does not fit in rank, alpha or targets.
        """
        self._check_lora()
        load_lora(self.unet, folder)

    def to_pipeline(self) -> Pipeline:
        """Returns a plain diffusers pipeline that draws what the policy draws, with any LoRA added in.

        It shares memory with the policy, but for the weights that a LoRA changed. Its scheduler is the checkpoint's. A
        guard is attached to it.
        """
        pipeline = plain_pipeline(self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler)
        if self.guard is not None:
            self.guard.attach(pipeline)
        return pipeline

    def save_pipeline(self, folder: str | Path) -> None:
        """Saves the whole pipeline in diffusers' layout, with any LoRA added in.

        Raises:
            ValueError: The policy has a guard, or networks that were added to the UNet: whoever loaded the folder
                would be without them.
        """
        if added_networks(self.unet):
            raise ValueError(
                "a pipeline's folder cannot hold networks that were added to the UNet, and this one has some"
            )
        if self.guard is not None:
            raise ValueError(f"a pipeline's folder cannot hold a guard, and the policy has {self.guard!r}")
        self.to_pipeline().save_pretrained(folder)

    # Small things.

    def _schedule(self, steps: int, device: torch.device | None = None) -> Schedule:
        """Returns the noise levels on a device, by default the policy's; they are copied there once."""
        key = (steps, self.device if device is None else device)
        if key not in self._schedules:
            plan = ddim.schedule(self.scheduler_config, steps)
            self._schedules[key] = Schedule(*(part.to(key[1]) for part in plan))
        return self._schedules[key]

    def _stochastic_schedule(self, steps: int, eta: float) -> Schedule:
        """Returns the schedule, checked for a density at every step."""
        _check_eta(eta)
        if eta == 0:
            raise ValueError("eta must be above 0 for log-probabilities, as a deterministic step has none, got 0")
        if int(self._schedule(steps, torch.device("cpu")).timesteps[-1]) == 0:
            spacing = self.scheduler_config.get("timestep_spacing")
            raise ValueError(
                f"the last step must start above timestep 0 to have a log-probability, got 0 from steps={steps} and "
                f"the checkpoint's timestep_spacing={spacing!r}"
            )
        return self._schedule(steps)

    def _steps(self, step: int, latents: Latents) -> Int[Tensor, " batch"]:
        return torch.full((len(latents),), step, dtype=torch.int64, device=latents.device)

    def _noise(self, seeds: Sequence[int], count: int, height: int, width: int) -> SampleNoise:
        _check_seeds(seeds, count)
        return SampleNoise(seeds, height=height, width=width, device=self.device)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Returns height and width of latents from those of an image."""
        factor = self.vae_scale_factor
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < 1 or value % factor):
                raise ValueError(f"{name} must be a positive multiple of the VAE's factor {factor}, got {value}")
        return (height or self.image_size) // factor, (width or self.image_size) // factor

    def _check_lora(self) -> None:
        if self.lora is None:
            raise ValueError("the policy must have a LoRA, and this one was made without; pass lora=LoRAConfig()")


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")


def _check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise ValueError(f"step must be from 0 to {steps - 1}, the last of {steps} steps, got {step}")


def _check_seeds(seeds: Sequence[int], count: int) -> None:
    if len(seeds) != count:
        raise ValueError(f"seeds must be one for each of the {count} samples, got {len(seeds)}")
