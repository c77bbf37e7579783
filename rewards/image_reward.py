"""ImageReward: how much people would like an image for a prompt, learned from ranked images.

Source: Xu et al. (2023), https://arxiv.org/abs/2304.05977, and THUDM/ImageReward, `ImageReward/ImageReward.py`. The
network is put together from transformers' own BLIP classes; a head reads the text encoder's [CLS] position, which has
attended to every patch of the image. Departures from the released code are listed in docs/rewards.md.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policy.types import Embeddings, Images, PerSample

from .blip_layout import from_official_names
from .blip_tokenizer import BlipTokenizer
from .image_reward_config import ImageRewardConfig
from .preprocess import ImageFile, normalise, open_image, pil_to_square, resize_and_crop
from .types import check_pairs, check_strings

OFFICIAL_FILES = {"ImageReward-v1.0": ("THUDM/ImageReward", "ImageReward.pt")}
"""Repository and file on the Hugging Face hub for each name that `ImageReward.load` knows."""
OFFICIAL_VOCABULARY = ("google-bert/bert-base-uncased", "vocab.txt")
"""Repository and file on the Hugging Face hub of the word pieces that the official checkpoint was trained with."""
IMAGES_PER_CALL = 32
"""Number of images that `score` and `inference_rank` push through the network at once."""


class ImageReward(nn.Module):
    """Scores images for prompts; differentiable in the images.

    There is no dropout, so `train()` and `eval()` give the same scores. A network made by the constructor can be
    trained; one that was loaded has frozen weights.

    Args:
        config: Sizes and constants. Replace it (`reward.config = dataclasses.replace(...)`) to change the constants.
        tokenizer: Turns prompts into ids below `config.vocab_size`.
    """

    differentiable = True
    gradient_checkpointing = False
    """Whether the vision tower's blocks are computed anew in the backward pass, to save memory; set it at any time.

    Scores and gradients stay bit-identical.
    """

    def __init__(self, config: ImageRewardConfig, tokenizer: BlipTokenizer) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"vocab_size must cover the tokenizer's {len(tokenizer)} ids, got {config.vocab_size}")
        self.config = config
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_size=config.vision_hidden_size,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_heads,
                intermediate_size=config.vision_intermediate_size,
                layer_norm_eps=config.vision_layer_norm_eps,
                initializer_range=config.initializer_range,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                encoder_hidden_size=config.vision_hidden_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                intermediate_size=config.text_intermediate_size,
                max_position_embeddings=config.max_positions,
                layer_norm_eps=config.text_layer_norm_eps,
                initializer_range=config.initializer_range,
                bos_token_id=None,  # for generation only; the defaults lie outside a small vocabulary
                eos_token_id=None,
                sep_token_id=None,
                is_decoder=True,  # gives the layers their attention to the image; the call itself is not causal
            ),
            add_pooling_layer=False,
        )
        widths = (config.hidden_size, *config.head_widths, 1)
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
        for layer in self._head_layers():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    @classmethod
    def load(cls, name: str | Path = "ImageReward-v1.0", *, vocab: str | Path | None = None) -> "ImageReward":
        """Loads frozen weights by name or from a path.

        Args:
            name: "ImageReward-v1.0" (1.8 GB from the Hugging Face hub, cached there), a checkpoint file in the
                official layout and sizes, or a folder written by `save_pretrained`.
            vocab: Vocabulary of an official checkpoint, one word piece per line; bert-base-uncased's from the hub
                where it is not given.

        Raises:
            ValueError: There is no such name and no such path.
        """
        if str(name) in OFFICIAL_FILES:
            return cls.from_official(_hub_file(*OFFICIAL_FILES[str(name)]), vocab=vocab)
        if Path(name).is_dir():
            return cls.from_pretrained(name)
        if Path(name).is_file():
            return cls.from_official(name, vocab=vocab)
        raise ValueError(f"name must be one of {', '.join(OFFICIAL_FILES)}, or a path that exists, got {str(name)!r}")

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        config: ImageRewardConfig | None = None,
        vocab: str | Path | Sequence[str] | None = None,
    ) -> "ImageReward":
        """Loads a checkpoint with the official names of tensors, every one of which must fit; frozen.

        Args:
            path: A `.safetensors` file, or a file of `torch.save` with tensors only (nothing else is unpickled).
            config: Sizes; those of ImageReward-v1.0 where it is not given.
            vocab: A file with one word piece per line, or the word pieces; bert-base-uncased's from the Hugging Face
                hub where it is not given.
        """
        state = from_official_names(_read_tensors(Path(path)))
        # Kept in the checkpoint from BLIP's pretraining; ImageReward does not use them.
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("vision_proj.", "text_proj."))}
        if vocab is None:
            vocab = _hub_file(*OFFICIAL_VOCABULARY)
        tokenizer = BlipTokenizer.from_file(vocab) if isinstance(vocab, str | Path) else BlipTokenizer(vocab)
        return cls(config or ImageRewardConfig(), tokenizer)._frozen_with(state)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageReward":
        """Loads what `save_pretrained` wrote; frozen, in float32 whatever the precision of the file."""
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("config.json", "vocab.txt", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"a folder of ImageReward.save_pretrained holds {name}, and {folder} does not")
        config = ImageRewardConfig.from_file(folder / "config.json")
        reward = cls(config, BlipTokenizer.from_file(folder / "vocab.txt"))
        return reward._frozen_with(load_file(folder / "model.safetensors"))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json`, `vocab.txt` and `model.safetensors`, in the weights' own precision or in `dtype`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder / "config.json")
        self.tokenizer.save(folder / "vocab.txt")
        state = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the standardised score of each image for its prompt, in float32; gradients flow to the images.

        Args:
            images: RGB in [0, 1], of any size; the short side is scaled to the network's and the centre cropped.
            prompts: One for each image; what is longer than `config.max_length` tokens is cut.

        Raises:
            TypeError: A prompt is not a string, or the images are not floating point.
            ValueError: The images are not a batch of RGB images, or there is not one prompt for each.
        """
        return self.standardise(self.raw_score(self.features(images, prompts)))

    def features(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "batch hidden"]:
        """Returns what the head reads: the text encoder's [CLS] position after it has attended to the image."""
        check_pairs(images, prompts)
        squares = resize_and_crop(images.float(), self.config.image_size, antialias=self.config.antialias)
        return self._features(squares, prompts)

    def raw_score(self, features: Float[Tensor, "batch hidden"]) -> PerSample:
        """Returns the head's output before it is standardised; always computed in float32."""
        with torch.autocast(features.device.type, enabled=False):
            hidden = features.float()
            for layer in self._head_layers():
                hidden = nn.functional.linear(hidden, layer.weight.float(), layer.bias.float())
        return hidden[:, 0]

    def standardise(self, raw_scores: PerSample) -> PerSample:
        """Subtracts the mean of the config and divides by its standard deviation."""
        return (raw_scores - self.config.mean) / self.config.std

    def score(self, prompt: str, image: ImageFile | Sequence[ImageFile]) -> float | list[float]:
        """Returns the score of one image, or the scores of a list of images, for one prompt.

        Takes and returns what the method of that name does in the package image-reward.

        Args:
            prompt: What the images were drawn for.
            image: A PIL image or a path, or a list of them.
        """
        if isinstance(image, Image.Image | str | Path):
            return self.inference_rank(prompt, [image])[1][0]
        return self.inference_rank(prompt, image)[1]

    def inference_rank(self, prompt: str, generations_list: Sequence[ImageFile]) -> tuple[list[int], list[float]]:
        """Returns the rank of each image among all, 1 being the best, and the scores, in the order of the images.

        Takes and returns what the method of that name does in the package image-reward, but for a list of one image,
        for which that package returns bare numbers and this returns lists of one.

        Args:
            prompt: What the images were drawn for.
            generations_list: PIL images or paths.
        """
        check_strings([prompt])
        if len(generations_list) == 0:
            raise ValueError("generations_list must hold at least one image, got none")
        scores = []
        for start in range(0, len(generations_list), IMAGES_PER_CALL):
            opened = [open_image(image) for image in generations_list[start : start + IMAGES_PER_CALL]]
            squares = torch.stack([pil_to_square(image, self.config.image_size) for image in opened])
            with torch.no_grad():
                features = self._features(squares.to(self.device), [prompt] * len(opened))
                scores.append(self.standardise(self.raw_score(features)))
        rewards = torch.cat(scores).cpu()
        best_first = rewards.argsort(descending=True, stable=True)
        ranks = best_first.argsort() + 1
        return ranks.tolist(), rewards.tolist()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _features(
        self, squares: Float[Tensor, "batch 3 size size"], prompts: Sequence[str]
    ) -> Float[Tensor, "batch hidden"]:
        """Returns the features of images in [0, 1] that already have the network's size."""
        pixels = normalise(squares, self.config.image_mean, self.config.image_std)
        patches = self._patches(pixels)
        tokens = self.tokenizer(prompts, self.config.max_length)
        output = self.text(
            input_ids=tokens.ids.to(patches.device),
            attention_mask=tokens.mask.to(patches.device),
            encoder_hidden_states=patches,
            is_decoder=False,
        )
        return output.last_hidden_state[:, 0]

    def _head_layers(self) -> list[nn.Linear]:
        """Returns the layers of the head, all linear, with nothing between them."""
        return [layer for layer in self.head if isinstance(layer, nn.Linear)]

    def _patches(self, pixels: Images) -> Embeddings:
        """Returns the vision tower's output for normalised images: the class token, then one token for each patch."""
        if not self.gradient_checkpointing:
            return self.vision(pixels).last_hidden_state
        # transformers' own switch acts in training mode only and was renamed within version 5; this one needs neither.
        hidden = self.vision.embeddings(pixels)
        for layer in self.vision.encoder.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
        return self.vision.post_layernorm(hidden)

    def _frozen_with(self, state: Mapping[str, Tensor]) -> "ImageReward":
        """Takes the weights, every one of which must be there and fit, and freezes them."""
        expected = self.state_dict()
        problems = [f"{name} is missing" for name in expected if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in expected]
        problems += [
            f"{name} has shape {list(state[name].shape)} and not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if problems:
            raise ValueError(f"weights must fit the config, got {len(problems)} that do not: {'; '.join(problems[:4])}")
        self.load_state_dict(dict(state))
        return self.requires_grad_(False).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without unpickling anything but tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"a checkpoint must map names to tensors, and {path} does not")
    return state


def _hub_file(repository: str, name: str) -> Path:
    """Returns the local copy of a file of the Hugging Face hub, fetching it first where there is none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except OSError as error:
        raise OSError(
            f"could not get {name} of {repository} from the Hugging Face hub; fetch it by other means and give its path"
        ) from error
