"""The policy: a Stable Diffusion as a decision process.

A state is (prompt, timestep, latents), an action the next latents, drawn from a Gaussian whose mean the UNet gives and
whose standard deviation the noise schedule gives. Everything that is particular to this family of models stays in this
package.

What was left out: samplers other than DDIM (of which ancestral DDPM sampling is eta = 1), safety checkers, training of
the text encoder or the VAE.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from . import autoencoder, ddim
from .conditioning import Conditioning
from .denoiser import all_at, mean_and_std, predict, predict_at, predicted, steps_of
from .flow import Chain
from .guidance import DEFAULT_GUIDANCE, Guidance, SamplingGuard
from .loading import PolicyOptions, default_device, load_pipeline
from .lora_files import LoRAFormat
from .noise import SampleNoise, check_seeds
from .parts import Pipeline
from .process import Process, add_noise, check_chosen, check_eta, check_span, check_step
from .prompts import PromptEncoder, check_prompts
from .saving import check_plain, plain_pipeline, write_pipeline
from .takeover import take_over
from .trained import TrainedWeights
from .trajectory import Trajectory
from .types import Images, Latents, PerSample, Plan
from .weights import LoRAConfig


class DiffusionPolicy:
    """Draws images from prompts, tells how likely its steps were, and carries the weights that are trained.

    Latents are float32 everywhere; only what goes into a network is rounded to its precision. Stored trajectories are
    therefore exact, and the log-probability of a step is that of the very latents that were stored.

    What recurs in its methods: `conditioning` are prompts, from `encode`; `steps` the number of denoising steps of a
    whole image, and `step` the index of one, counted from noise; `guidance` what makes one prediction of several, by
    default classifier-free guidance of 5; `eta` the share of the noise of ancestral sampling, in [0, 1], where 0 is
    deterministic; `seeds` one for each sample, whose noise depends on nothing else; `height` and `width` those of the
    image in pixels, by default the size of training. What is out of its range raises a `ValueError`, and so do seeds
    that are not as many as prompts, a side that the VAE's factor does not divide, and a step without a density where
    a log-probability is asked for.

    Args:
        pipeline: Its networks become the policy's; all are frozen but for what `lora` or `train` names.
        lora: Trains a fresh low-rank adapter on the UNet.
        train: Trains a named set of the UNet's own parameters, see `PARAMETER_SETS`. Only without `lora`.
        dtype: Precision that all frozen weights are brought to; None leaves each network as it is.
        device: Where to put the networks; None is this process's GPU, or the CPU where there is none.
        gradient_checkpointing: Recomputes activations of UNet and VAE in the backward pass instead of keeping them.
        compile: Compiles the denoising network with `torch.compile`.
        tiling: Lets the VAE go over large images in tiles, which takes less memory and changes their seams a little.
        max_sequence_length: Tokens that a T5 reads of a prompt; None is as many as diffusers' pipeline lets it, 256 for
            Stable Diffusion 3 and 512 for FLUX.
        chain: Which noise the stochastic steps of a flow add, see `overpaint.policy.flow`; None is "sde".

    Raises:
        ValueError: The pipeline is not a Stable Diffusion or carries what a policy cannot take over, or the options
            contradict each other.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        lora: LoRAConfig | None = None,
        train: str | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        tiling: bool = False,
        max_sequence_length: int | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.family = take_over(pipeline, max_sequence_length)
        """What the family of the model has of its own, and all its networks."""
        self.model: Any = self.family.model
        """The denoising network, a UNet or a transformer."""
        self.vae: Any = self.family.vae
        self.scheduler: Any = self.family.scheduler
        self.prompts = PromptEncoder.of(self.family)
        self.process: Process = self.family.process(chain)
        """How noise becomes an image."""
        self.guard: SamplingGuard | None = None
        """What keeps something out of pictures by changing how they are sampled, if anything does."""
        self.network: Callable[..., Any] = self.model
        """What every call of the denoising network goes through; a training run puts its wrapper here."""
        for network in self.family.networks:
            network.requires_grad_(False).eval()  # trained parameters are then switched on one by one
            wanted = self.family.vae_precision(dtype) if network is self.vae else dtype
            if wanted is not None and network.dtype != wanted:
                nn.Module.to(network, dtype=wanted)  # the networks' own warns of float32 layers
        if lora is not None and lora.targets is None:
            lora = replace(lora, targets=self.family.lora_targets)
        self._trained = TrainedWeights(self.model, lora, train)
        self._weight: Tensor = self.model.get_parameter(self.family.first_weight)
        self.to(default_device() if device is None else torch.device(device))
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        if tiling:
            self.vae.enable_tiling()
        if compile:
            self.model.compile()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, config: str | Path | None = None, **options: Unpack[PolicyOptions]
    ) -> "DiffusionPolicy":
        """Loads a checkpoint: a folder in diffusers' layout, a hub id, or a single `.safetensors` or `.ckpt` file.

        Args:
            path: The folder, the file, or the id, such as "CompVis/stable-diffusion-v1-4".
            config: For a single file: a folder or hub id whose configuration and tokenizer it takes, without weights.
            **options: See the class.

        Raises:
            ValueError: There is no such checkpoint, or it is of another kind (inpainting, a refiner); and as the class.
        """
        return cls(load_pipeline(path, options.get("dtype", torch.float32), config), **options)

    @property
    def unet(self) -> Any:
        """The denoising network of a family that has a UNet.

        Raises:
            ValueError: It is a transformer; what asks for a UNet works on its cross-attention, or on its blocks.
        """
        if self.family.network != "unet":
            raise ValueError(f"the model must have a UNet, and a {self.family.pipelines[0]} has a transformer")
        return self.model

    @property
    def text_encoder(self) -> Any:
        """The text encoder whose words a prompt is made of; there may be others."""
        return self.prompts.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of that text encoder."""
        return self.prompts.tokenizer

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The settings of the checkpoint's scheduler."""
        return self.process.config

    @property
    def device(self) -> torch.device:
        """Where the denoising network is."""
        return self._weight.device  # a network's own looks through every module each time it is asked

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its frozen weights, which a LoRA in float32 does not change."""
        return self._weight.dtype

    @property
    def sample_size(self) -> int:
        """Side of the latents that it was trained on."""
        return self.family.sample_size

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained on, in pixels."""
        return self.sample_size * autoencoder.scale_factor(self.vae)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Returns channels, height and width of the latents of an image."""
        return autoencoder.latent_shape(self.vae, self.sample_size, height, width, patch=self.family.patch)

    def to(self, device: str | torch.device) -> "DiffusionPolicy":
        """Moves the networks to a device and returns the policy."""
        for network in self.family.networks:
            network.to(device)
        return self

    # Prompts and images in and out.

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, at least one; each goes through the text encoder once, and without gradient."""
        return self.prompts(prompts)

    def release_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes prompts and the empty one, and gives back the memory of the text encoders, 9.5 GB for a T5-XXL.

        From then on no other prompt can be drawn, and no whole pipeline saved; a LoRA can.

        Raises:
            ValueError: There are no prompts, or one is not a string.
        """
        self.prompts.keep(prompts)
        self.family.release_encoders()

    def decode(self, latents: Latents, *, chunk: int = autoencoder.CHUNK) -> Images:
        """Returns images of latents, `chunk` at a time, clamped to [0, 1]; gradients flow to the latents."""
        return autoencoder.decode(self.vae, latents, chunk=chunk)

    def encode_images(
        self, images: Images, *, seeds: Sequence[int] | None = None, chunk: int = autoencoder.CHUNK
    ) -> Latents:
        """Returns the latents of images, without gradient: draws from the VAE's posterior, or its mean."""
        noise = self._noise(range(len(images)) if seeds is None else seeds, images, *images.shape[-2:])
        return autoencoder.encode(self.vae, images, noise=None if seeds is None else noise.draw, chunk=chunk)

    def predict_noise(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: Guidance | None = None,
        *,
        steps: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """Returns the noise that the UNet sees in noised latents, whatever kind of prediction it makes.

        Args:
            latents: Noised latents.
            timesteps: The scheduler's integer of each sample.
            conditioning: The prompt of each sample.
            guidance: None is the prediction for the prompt alone, without guidance.
            steps: Index of each sample's step, for a guidance that changes on the way; by default that of its timestep
                among all of training's.
        """
        return self.process.noise(latents, *predicted(self, latents, timesteps, conditioning, guidance, steps))

    def predict_direction(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: Guidance | None = None,
        *,
        steps: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """Returns what `predict_noise` does in diffusion, and the velocity in a flow; arguments as there.

        Losses compare these, since errors of them weigh alike at all levels; a flow's noise is `1 - s` times as wrong
        as its velocity, which at its first level says nothing.
        """
        return self.process.direction(latents, *predicted(self, latents, timesteps, conditioning, guidance, steps))

    def direction(self, clean: Latents, noise: Latents) -> Latents:
        """Returns what `predict_direction` should see in clean latents with noise: the noise, or the velocity."""
        return self.process.direction_of(clean, noise)

    def predict(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Latents:
        """Returns what the network predicts for the prompts alone, of its own kind: see `process.prediction_type`."""
        return predict(self, latents, timesteps, conditioning)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        *,
        steps: int = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 0.0,
        seeds: Sequence[int],
        until: int | None = None,
        latents: Latents | None = None,
        start: int = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> Latents:
        """Denoises from noise, or from latents before a step `start`, and stops before `until`, or at the end."""
        plan = self.plan(steps, height, width)
        check_span(start, until, steps, given=latents is not None)
        check_eta(eta)
        noise = self._noise(seeds, conditioning, height, width)
        state = noise.draw() if latents is None else latents
        for state, _, _ in steps_of(self, state, conditioning, plan, guidance, eta, noise, until, start):  # noqa: B007, B020
            pass
        return state

    @torch.no_grad()
    def rollout(
        self,
        conditioning: Conditioning,
        *,
        steps: int = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 1.0,
        seeds: Sequence[int],
        height: int | None = None,
        width: int | None = None,
        stochastic: Sequence[int] | None = None,
        keep_means: bool = False,
    ) -> Trajectory:
        """Samples as `sample` does, to the end, and keeps every state and the log-probability of every step.

        Only the steps `stochastic`, by default all that can, draw from their Gaussian; others go to where they lead
        without noise, and their log-probability is NaN. Every step takes its noise from the sample's stream, used or
        not, so that the choice moves no other noise.
        """
        possible = self.process.stochastic_steps(steps, eta)
        chosen = check_chosen(possible if stochastic is None else stochastic, possible)
        plan = self.plan(steps, height, width)
        noise = self._noise(seeds, conditioning, height, width)
        states, log_probs, means = [noise.draw()], [], []
        taken = steps_of(self, states[0], conditioning, plan, guidance, eta, noise, stochastic=chosen)
        for step, (latents, mean, std) in enumerate(taken):
            states.append(latents)
            density = (
                ddim.gaussian_log_prob(latents, mean, std)
                if step in chosen
                else torch.full_like(std, torch.nan).double()
            )
            log_probs.append(density)
            if keep_means:
                means.append(mean)
        kept = torch.stack(means, dim=1) if keep_means else None
        return Trajectory(torch.stack(states, dim=1), torch.stack(log_probs, dim=1), plan.timesteps, conditioning, kept)

    def log_prob(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 1.0,
    ) -> PerSample:
        """Returns the log-probability of stored steps; with the rollout's weights and shape it is the stored number."""
        return ddim.gaussian_log_prob(*self.stored_steps(trajectory, samples, steps, guidance=guidance, eta=eta))

    def stored_steps(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 1.0,
    ) -> tuple[Latents, Latents, PerSample]:
        """Returns where stored steps led, and the Gaussians that the present weights would draw them from.

        Args:
            trajectory: From `rollout`, with the same guidance and eta; may lie on another device.
            samples: Index of the sample of each wanted pair.
            steps: Index of the step of each wanted pair.
            guidance: As in the rollout.
            eta: As in the rollout.

        Returns:
            The latents after each step, the mean, with gradient where it is enabled, and the standard deviation.
        """
        states = trajectory.latents
        self.process.stochastic_steps(len(trajectory.timesteps), eta)
        plan = self.process.plan(len(trajectory.timesteps), _size_of(states), self.device)
        conditioning = trajectory.conditioning[samples].to(self.device)
        samples, steps = samples.to(states.device), steps.to(states.device)
        before, after = (states[samples, at].to(self.device) for at in (steps, steps + 1))
        moments = mean_and_std(self, before, conditioning, plan, steps.to(self.device), guidance, eta)
        return after, *moments

    def denoise(
        self,
        latents: Latents,
        conditioning: Conditioning,
        *,
        step: int,
        steps: int = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 0.0,
        noise: Latents | None = None,
    ) -> Latents:
        """Takes one step, with gradient where it is enabled; with eta above 0 it adds the noise, scaled by its std."""
        plan = self.process.plan(steps, _size_of(latents), self.device)
        check_step(step, steps)
        check_eta(eta)
        if eta > 0 and noise is None:
            raise ValueError(f"noise must be given with eta={eta}, got None")
        mean, std = mean_and_std(self, latents, conditioning, plan, all_at(step, latents), guidance, eta)
        return mean if noise is None else mean + std.view(-1, 1, 1, 1) * noise

    def predict_clean(
        self,
        latents: Latents,
        conditioning: Conditioning,
        *,
        step: int,
        steps: int = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
    ) -> Latents:
        """Returns the clean latents as one call of the UNet guesses them, with gradient where it is enabled."""
        plan = self.process.plan(steps, _size_of(latents), self.device)
        check_step(step, steps)
        indices = all_at(step, latents)
        prediction = predict_at(self, latents, conditioning, plan, indices, guidance)
        return self.process.clean(latents, prediction, plan.levels[indices])

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: float = 0.0,
        batch_size: int = 16,
        height: int | None = None,
        width: int | None = None,
    ) -> Images:
        """Draws an image for each prompt: encodes, samples and decodes, `batch_size` at a time."""
        wanted = check_prompts(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_seeds(seeds, len(wanted))
        images = []
        for start in range(0, len(wanted), batch_size):
            part = slice(start, start + batch_size)
            latents = self.sample(
                self.encode(wanted[part]), steps=steps, guidance=guidance, eta=eta, seeds=seeds[part], height=height,
                width=width,
            )  # fmt: skip
            images.append(self.decode(latents))
        return torch.cat(images)

    # Forward noising, for losses on images that exist.

    @property
    def num_timesteps(self) -> int:
        """How many timesteps training had: from 0, nearly an image, to one less, nearly noise."""
        return self.process.num_timesteps

    def plan(self, steps: int, height: int | None = None, width: int | None = None) -> Plan:
        """Returns the timesteps and levels that sampling with that many steps visits, on the policy's device."""
        return self.process.plan(steps, self.latent_shape(height, width)[1:], self.device)

    def add_noise(self, clean: Latents, noise: Latents, timesteps: Shaped[Tensor, " batch"]) -> Latents:
        """Returns clean latents noised forward to the timestep of each sample."""
        return add_noise(self.process, clean, noise, self.process.levels(timesteps.to(clean.device)))

    def denoising_loss(
        self, latents: Latents, conditioning: Conditioning, timesteps: Shaped[Tensor, " batch"], noise: Latents
    ) -> PerSample:
        """Returns the loss of pretraining for each sample: the mean squared error of the network's own prediction.

        The prediction is without guidance, and of noise, velocity or clean latents as the network makes it: so the
        error is finite at every timestep, also where a schedule ends without any signal. `timesteps` are uniform over
        training's in pretraining, `noise` standard normal. Source: Ho et al. (2020), https://arxiv.org/abs/2006.11239,
        equation 14.
        """
        noised = self.add_noise(latents, noise, timesteps)
        prediction = predict(self, noised, timesteps, conditioning)
        target = self.process.target(latents, noise, self.process.levels(timesteps.to(latents.device)))
        return ((prediction - target) ** 2).flatten(1).mean(dim=1)

    def shard(self, processes: int) -> None:
        """Spreads the frozen weights over connected processes, in place and for good, and leaves the LoRA whole.

        From then on all processes have to call the network equally often, and the LoRA is all that can be saved.

        Raises:
            ValueError: There is no LoRA.
        """
        self._trained.shard(self.family.blocks(), processes, self.device, self.guard)

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
        """Puts back what `trainable_state` gave; a `ValueError` where names or shapes differ leaves all as it was."""
        self._trained.load_state(state)

    def remember_reference(self, others: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Makes the present weights the reference, but for some others by name; a LoRA's is the UNet beneath it."""
        self._trained.remember(others)

    def student_copy(self, train: str | LoRAConfig | None = None) -> "DiffusionPolicy":
        """Returns a policy that draws the same, with a UNet of its own, in float32; a named set or a LoRA is trained.

        Text encoder and VAE are shared. A LoRA is added in. `network` and gradient checkpointing are a new policy's.
        """
        plain: Any = self._plain()
        name = self.family.network
        setattr(plain, name, copy.deepcopy(getattr(plain, name)).float())
        lora, names = (train, None) if isinstance(train, LoRAConfig) else (None, train)
        student = DiffusionPolicy(plain, lora=lora, train=names, dtype=None, device=self.device)
        student.prompts, student.process = self.prompts, self.process
        # Its own guard too: one may remember where a trajectory is, or change what goes on inside of its UNet.
        student.guard = copy.deepcopy(self.guard, {id(self.model): student.model, id(self.prompts): self.prompts})
        return student

    @contextmanager
    def reference(self) -> Generator[None, None, None]:
        """Turns the policy into the one that training started from, without a second UNet and without gradients."""
        with self._trained.at_reference():
            yield

    @contextmanager
    def with_weights(self, state: Mapping[str, Tensor]) -> Generator[None, None, None]:
        """Puts weights that `trainable_state` gave in the place of the present ones, without gradients."""
        with self._trained.at(state):
            yield

    def merge_lora(self) -> None:
        """Adds the LoRA, which there must be, into the UNet's own weights; nothing is trained any more afterwards."""
        self._trained.merge_lora()

    def save_lora(self, path: str | Path, *, format: LoRAFormat = "diffusers") -> None:
        """Saves the LoRA, which there must be, as a `.safetensors` or into a folder; "kohya" is for A1111, ComfyUI."""
        self._trained.save_lora(path, format, self.guard)

    def load_lora(self, path: str | Path, *, check_base: bool = True, drop_text_encoder: bool = False) -> None:
        """Puts a LoRA's file, or the one in a folder, into the policy's LoRA; one without takes the file's settings.

        A `ValueError` refuses what is not for this UNet, has other settings than the policy's LoRA, was learned on
        other weights (unless `check_base` is off) or changes the text encoder (unless that is to be dropped).
        """
        self._trained.load_lora(path, self.guard, check_base=check_base, drop_text_encoder=drop_text_encoder)

    def to_pipeline(self) -> Pipeline:
        """Returns a plain diffusers pipeline that draws what the policy draws: a LoRA is added in, a guard attached.

        It shares memory with the policy, but for the weights that a LoRA changed. Its scheduler is the checkpoint's.
        """
        pipeline = self._plain()
        if self.guard is not None:
            self.guard.attach(pipeline)
        return pipeline

    def save_pipeline(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Saves the whole pipeline in diffusers' layout, with any LoRA added in, in one precision or as it is.

        A `ValueError` refuses a policy with a guard or with networks that were added to the UNet: whoever loaded the
        folder would be without them.
        """
        check_plain(self.model, self.guard)
        write_pipeline(self._plain(dtype), folder)

    def _plain(self, dtype: torch.dtype | None = None) -> Pipeline:
        self._trained.check_whole()
        if self.family.released:
            raise ValueError("the text encoders must be there to copy or save the model, and were released")
        return plain_pipeline(self.family, dtype)

    def _noise(self, seeds: Sequence[int], samples: Sized, height: int | None, width: int | None) -> SampleNoise:
        check_seeds(seeds, len(samples))
        return SampleNoise(seeds, self.latent_shape(height, width), self.device)


def _size_of(latents: Tensor) -> tuple[int, int]:
    """Returns height and width of latents, or of states of a trajectory."""
    return latents.shape[-2], latents.shape[-1]
