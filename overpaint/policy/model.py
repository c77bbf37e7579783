"""A loaded text-to-image model: its networks, prompts and images in and out, and the weights that are trained.

What was left out: safety checkers, training of the text encoders or the VAE.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from overpaint.settings import Count, Seed

from . import autoencoder
from .conditioning import Conditioning
from .flow import Chain
from .guidance import SamplingGuard
from .loading import PolicyOptions, default_device, load_pipeline
from .lora_files import LoRAFormat
from .noise import SampleNoise, check_seeds
from .parts import Pipeline
from .process import Process
from .prompts import PromptEncoder
from .saving import check_plain, plain_pipeline, write_pipeline
from .takeover import take_over
from .trained import TrainedWeights
from .types import Images, Latents
from .weights import LoRAConfig

Own = TypeVar("Own", bound="TextToImageModel")


class TextToImageModel:
    """The networks of a model of any known family, frozen but for what is trained, and what they are saved as.

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
        max_sequence_length: Count | None = None,
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
        cls: type[Own], path: str | Path, *, config: str | Path | None = None, **options: Unpack[PolicyOptions]
    ) -> Own:
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

    def latent_shape(self, height: Count | None = None, width: Count | None = None) -> tuple[int, int, int]:
        """Returns channels, height and width of the latents of an image."""
        return autoencoder.latent_shape(self.vae, self.sample_size, height, width, patch=self.family.patch)

    def to(self: Own, device: str | torch.device) -> Own:
        """Moves the networks to a device and returns the policy."""
        for network in self.family.networks:
            network.to(device)
        return self

    # Prompts and images in and out.

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, at least one; each goes through the text encoder once, and without gradient."""
        return self.prompts(prompts).to(self.device)

    def release_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes prompts and the empty one, and gives back the memory of the text encoders, 9.5 GB for a T5-XXL.

        From then on no other prompt can be drawn, and no whole pipeline saved; a LoRA can.

        Raises:
            ValueError: There are no prompts, or one is not a string.
        """
        self.prompts.keep(prompts)
        self.family.release_encoders()

    def decode(self, latents: Latents, *, chunk: Count = autoencoder.CHUNK) -> Images:
        """Returns images of latents, `chunk` at a time, clamped to [0, 1]; gradients flow to the latents."""
        return autoencoder.decode(self.vae, latents, chunk=chunk)

    def encode_images(
        self, images: Images, *, seeds: Sequence[Seed] | None = None, chunk: Count = autoencoder.CHUNK
    ) -> Latents:
        """Returns the latents of images, without gradient: draws from the VAE's posterior, or its mean."""
        noise = self._noise(range(len(images)) if seeds is None else seeds, images, *images.shape[-2:])
        return autoencoder.encode(self.vae, images, noise=None if seeds is None else noise.draw, chunk=chunk)

    # Weights.

    def shard(self, processes: Count) -> None:
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

    def student_copy(self: Own, train: str | LoRAConfig | None = None) -> Own:
        """Returns a policy that draws the same, with a UNet of its own, in float32; a named set or a LoRA is trained.

        Text encoder and VAE are shared. A LoRA is added in. `network` and gradient checkpointing are a new policy's.
        """
        plain: Any = self._plain()
        name = self.family.network
        setattr(plain, name, copy.deepcopy(getattr(plain, name)).float())
        lora, names = (train, None) if isinstance(train, LoRAConfig) else (None, train)
        student = type(self)(plain, lora=lora, train=names, dtype=None, device=self.device)
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
