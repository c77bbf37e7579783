"""What one family of models has of its own: its networks, how it reads a text, and how its network is called."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from overpaint.policy.conditioning import Conditioning
from overpaint.policy.digest import network_digest
from overpaint.policy.flow import Chain
from overpaint.policy.guidance import ClassifierFree, Guidance
from overpaint.policy.parts import VAE, Pipeline
from overpaint.policy.process import Process
from overpaint.policy.types import Latents

TextPart = Literal["tokens", "pooled"]
"""What a network reads of a text: its tokens one by one, or the text as a whole."""

BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")
"""Names of the blocks and of the lists of them in UNets and transformers."""


class Family(ABC):
    """The parts of a pipeline of one family, plain, and what is done with them in no other family.

    Args:
        pipeline: Whose parts they are.
        max_sequence_length: Tokens that a T5 reads; None is the family's own number.

    Raises:
        ValueError: `max_sequence_length` is given to a family without a T5, or out of its range.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Classes of diffusers' pipelines that are made of these parts; the first is what is loaded and saved."""

    network: ClassVar[Literal["unet", "transformer"]]
    """Name of the denoising network: the pipeline's attribute, the checkpoint's folder, and what LoRAs begin with."""

    classes: ClassVar[Mapping[str, str]]
    """Class of each network by its name in the pipeline: the denoising network, "vae", and the text encoders in their
    order."""

    first_weight: ClassVar[str]
    """A weight of the denoising network that is never trained apart from others; its device and precision are the
    network's."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Endings of the names of the layers that a LoRA is put on by default: all projections of attention."""

    text_maps: ClassVar[Mapping[TextPart, tuple[str, ...]]] = MappingProxyType({})
    """Endings of the names of the matrices that a text alone is multiplied with, by which part of it that is; none
    where several encoders' tokens stand in one sequence."""

    negative_prompts: ClassVar[bool] = True
    """Whether its usual guidance has a branch that a negative prompt can lead away from."""

    text_length: ClassVar[int | None] = None
    """Tokens that the T5 reads by default; None where there is none."""

    def __init__(self, pipeline: Pipeline, max_sequence_length: int | None = None) -> None:
        parts: Any = pipeline
        names = self.encoder_names()
        self.model: Any = getattr(parts, self.network)
        self.vae: VAE = parts.vae
        self.encoders: tuple[Any, ...] = tuple(getattr(parts, name) for name in names)
        self.tokenizers: tuple[Any, ...] = tuple(getattr(parts, tokenizer_of(name)) for name in names)
        self.scheduler: Any = parts.scheduler
        self.max_sequence_length = self._checked_length(max_sequence_length)
        self.released: dict[str, str] = {}
        """SHA-256 of the weights of each text encoder that has given back its memory, by its name in the pipeline."""

    @classmethod
    def encoder_names(cls) -> tuple[str, ...]:
        """Returns the names of the text encoders in the pipeline."""
        return tuple(name for name in cls.classes if name.startswith("text_encoder"))

    @classmethod
    def folders(cls) -> tuple[str, ...]:
        """Returns the folders of a checkpoint."""
        return (*cls.classes, *map(tokenizer_of, cls.encoder_names()), "scheduler")

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Returns the names of networks that a pipeline may lack."""
        return frozenset()

    @staticmethod
    @abstractmethod
    def check_network(config: Mapping[str, Any]) -> None:
        """Checks by its configuration that the denoising network reads what it is given, and nothing else.

        Raises:
            ValueError: It does not.
        """

    @staticmethod
    @abstractmethod
    def check_scheduler(scheduler: Any) -> None:
        """Checks that a policy's steps are those of a scheduler.

        Raises:
            ValueError: They are not.
        """

    def with_encoders_in_float32(self) -> "Family":
        """Returns the same parts with copies of the text encoders in float32, whatever they are in here."""
        other = copy.copy(self)
        other.encoders = tuple(copy.deepcopy(one).float() if one is not None else None for one in self.encoders)
        return other

    @property
    def networks(self) -> tuple[Any, ...]:
        """The denoising network, the VAE, and the text encoders that there are and have not been released."""
        there = () if self.released else self.encoders
        return (self.model, self.vae, *(encoder for encoder in there if encoder is not None))

    def release_encoders(self) -> None:
        """Gives back the memory of the text encoders, for good; that they were there, records go on telling."""
        for name, encoder in zip(self.encoder_names(), self.encoders, strict=True):
            if encoder is not None and name not in self.released:
                self.released[name] = network_digest(encoder, name)
                encoder.to("meta")

    @property
    def named_networks(self) -> dict[str, nn.Module]:
        """The same by their names in the pipeline."""
        encoders = dict(zip(self.encoder_names(), self.encoders, strict=True))
        named = {self.network: self.model, "vae": self.vae, **encoders}
        return {name: part for name, part in named.items() if part is not None and name not in self.released}

    def vae_precision(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the precision that the VAE is brought to: float32 in place of float16 where its settings say so.

        SDXL's gives NaN in float16.
        """
        return torch.float32 if dtype == torch.float16 and self.vae.config.get("force_upcast") else dtype

    def blocks(self) -> list[nn.Module]:
        """Returns the parts of the denoising network that are spread over processes one by one."""
        found: list[nn.Module] = []
        for name, child in self.model.named_children():
            if name in BLOCKS:
                found += child if isinstance(child, nn.ModuleList) else [child]
        return found

    @property
    def patch(self) -> int:
        """Side of the square of latents that the network reads as one token."""
        return 1

    @property
    def sample_size(self) -> int:
        """Side of the latents that the network was trained on."""
        return int(self.model.config["sample_size"])

    @abstractmethod
    def process(self, chain: Chain | None = None) -> Process:
        """Returns how noise becomes an image; `chain` is the noise of a flow's steps, by default "sde".

        Raises:
            ValueError: There is a `chain`, and the family is of diffusion.
        """

    @property
    def reader(self) -> tuple[Any, Any]:
        """The text encoder whose room a prompt must fit in, and its tokenizer."""
        return self.encoders[0], self.tokenizers[0]

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read by all that read its words."""
        return int(self.tokenizers[0].model_max_length)

    def encode(self, text: str) -> Conditioning:
        """Returns one text as the network reads it, without gradient; one text encoder alone needs no own way.

        Raises:
            NotImplementedError: There is one text encoder, and `PromptEncoder` asks it itself.
        """
        raise NotImplementedError

    def away(self, empty: Conditioning) -> Conditioning:
        """Returns what guidance leads away from where no negative prompt is given, from the encoded empty one."""
        return empty

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """Returns what classifier-free guidance of a scale is in this family.

        Raises:
            ValueError: There is no such guidance.
        """
        return guidance

    @abstractmethod
    def call(
        self,
        network: Any,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        dtype: torch.dtype,
    ) -> Latents:
        """Returns what the network, wrapped or not, predicts, in the network's precision.

        Args:
            network: The denoising network, or what a training run has put around it.
            latents: Of any precision.
            timesteps: One for each, or one for each of a first part of several; as the process counts them.
            conditioning: One row for each.
            dtype: Precision of the network's weights.
        """

    def pipeline(self, model: nn.Module, others: Mapping[str, nn.Module]) -> Pipeline:
        """Returns a plain pipeline of diffusers with another denoising network and other networks by their names."""
        return build(type(self), {**others, self.network: model}, self.tokenizers, self.scheduler, self.options())

    def options(self) -> dict[str, Any]:
        """Returns what a plain pipeline is made with besides the parts."""
        return {}

    def _checked_length(self, length: int | None) -> int | None:
        if self.text_length is None:
            if length is not None:
                raise ValueError(
                    f"max_sequence_length must be left out for a {self.pipelines[0]}, which has no T5, got {length}"
                )
            return None
        if length is not None and not 1 <= length <= 512:
            raise ValueError(f"max_sequence_length must be from 1 to 512, got {length}")
        return self.text_length if length is None else length


def build(
    family: type[Family],
    networks: Mapping[str, nn.Module],
    tokenizers: Sequence[Any],
    scheduler: Any,
    options: Mapping[str, Any],
) -> Pipeline:
    """Returns a pipeline of diffusers.

    Args:
        family: Whose.
        networks: By their names; what may be lacking may lack.
        tokenizers: One for each text encoder, in their order; None for one that lacks.
        scheduler: A new one of its configuration is made.
        options: What else it is made with, see `Family.options`.
    """
    import diffusers

    make: Any = getattr(diffusers, family.pipelines[0])
    absent = dict.fromkeys(family.optional())
    readers = dict(zip(map(tokenizer_of, family.encoder_names()), tokenizers, strict=True))
    return make(**{**absent, **readers, **networks}, scheduler=type(scheduler).from_config(scheduler.config), **options)


def tokenizer_of(encoder: str) -> str:
    """Returns the name of the tokenizer that belongs to a text encoder in a pipeline."""
    return encoder.replace("text_encoder", "tokenizer")


@torch.no_grad()
def read(encoder: Any, tokenizer: Any, text: str, length: int, **options: Any) -> Any:
    """Returns a text encoder's output for a text that is padded or cut to a number of tokens, all of them attended.

    It computes in the precision of its own weights, inside autocast as outside.
    """
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    text = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]
    with torch.autocast(encoder.device.type, enabled=False):
        return encoder(ids.to(encoder.device), **options)


def inner_states(
    encoders: Sequence[Any], tokenizers: Sequence[Any], text: str
) -> tuple[Float[Tensor, "1 tokens dim"], list[Float[Tensor, "1 ..."]]]:
    """Returns the last but one states of several CLIPs side by side, and what each has for the whole text.

    The states are without the final norm; the text as a whole is projected where the encoder does so.
    """
    states, whole = [], []
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        output = read(encoder, tokenizer, text, tokenizer.model_max_length, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        whole.append(output[0])
    return torch.cat(states, dim=-1), whole
