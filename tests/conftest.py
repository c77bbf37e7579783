"""Fixtures that every test folder uses: a tiny Stable Diffusion built in code, and the shared material.

The tiny pipeline has every part of the real one (CLIP tokenizer and text encoder, cross-attention UNet,
VAE with a factor of 8, PNDM scheduler configuration of Stable Diffusion v1.4) and about 60,000 random weights.
The tokenizer is written to disk here, because the dummy ones that libraries offer are downloads.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from overpaint.policy import DiffusionPolicy, LoRAConfig, SampleNoise

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test asks the network

pytest_plugins = ["golden_case", "proof_marker"]

ROOT = Path(__file__).resolve().parents[1]

LONG = (
    "test_documentation.py", "test_examples.py", "test_recovery.py", "test_mixed_precision.py", "test_ddpo_resume.py",
    "test_destruction.py", "test_erasure_pareto.py", "test_ddpo_processes.py", "test_tinyworld_weights.py",
    "test_tiny_world_rates.py", "test_forms.py", "test_ddpo_benchmark.py", "test_generation_kills.py",
)  # fmt: skip
"""Files that take half a minute or more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the long files."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


TOKENS = 24
"""Length of the tiny text encoder's context, on purpose not CLIP's 77."""

WORDS = """
a an and the of on in with no two one red green blue yellow circle square triangle striped plain dotted stripes dots
small large big shape background person naked nude clothed photo painting picture image cat dog style
""".split()  # noqa: SIM905  a list of fifty quoted words is no easier to read
"""Words that are one token each; any other word is spelled letter by letter."""


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, tokens: int = TOKENS) -> Path:
    """Writes the files of a CLIP tokenizer whose vocabulary is all bytes and the given words."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        # "red" is first r + e, then re + d</w>; a prefix that an earlier word has merged is not listed twice.
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merged = pieces[0]
        for piece in pieces[1:]:
            if (merged, piece) not in merges:
                merges.append((merged, piece))
            merged += piece
            if merged not in vocabulary:
                vocabulary.append(merged)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokens,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Builds the tiny pipeline with random weights and saves it in diffusers' layout."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            use_linear_projection=prediction_type == "v_prediction",  # as Stable Diffusion 2 has it
        )
        vae = diffusers.AutoencoderKL(
            sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler: Any = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    # Stable Diffusion's scheduler file says this although PNDM has no such setting; DDIM reads it.
    scheduler.register_to_config(clip_sample=False)
    make: Any = diffusers.StableDiffusionPipeline  # its annotations do not know that parts may be None
    pipeline = make(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forgets what a test imported of files that it wrote itself, and where it looked: another may use their names."""
    path, known, temporary = list(sys.path), set(sys.modules), tmp_path_factory.getbasetemp()
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - known:
        if Path(getattr(sys.modules[name], "__file__", None) or ".").is_relative_to(temporary):
            del sys.modules[name]


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny epsilon-prediction pipeline; read it, do not write to it."""
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "epsilon")


@pytest.fixture(scope="session")
def v_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny v-prediction pipeline; read it, do not write to it."""
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "v_prediction", prediction_type="v_prediction", seed=1)


@pytest.fixture
def pipeline_copy(pipeline_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline's folder that a test may damage."""
    return Path(shutil.copytree(pipeline_dir, tmp_path / "pipeline"))


@pytest.fixture
def make_policy(pipeline_dir: Path) -> Callable[..., DiffusionPolicy]:
    """Loads the tiny pipeline anew with any options of `DiffusionPolicy.from_pretrained`."""

    def make(**options: Any) -> DiffusionPolicy:
        path = options.pop("path", pipeline_dir)
        return DiffusionPolicy.from_pretrained(path, device="cpu", **options)

    return make


@pytest.fixture
def policy(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    """A fresh tiny policy with a fresh LoRA of rank 4."""
    return make_policy(lora=LoRAConfig())


@pytest.fixture
def v_policy(make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path) -> DiffusionPolicy:
    """A fresh tiny v-prediction policy with a fresh LoRA of rank 4."""
    return make_policy(path=v_pipeline_dir, lora=LoRAConfig())


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Callable[[DiffusionPolicy], DiffusionPolicy]:
    """Puts a policy and its reference in float64, with nothing between in float32: `float` is `double` in this test.

    For what rounding hides: a small difference of large numbers, a value at the edge of a clamp, sums in another order.
    """

    def widened(policy: DiffusionPolicy) -> DiffusionPolicy:
        policy.unet.double()
        policy.vae.double()
        policy.remember_reference()
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        draw = SampleNoise.draw
        monkeypatch.setattr(SampleNoise, "draw", lambda self: draw(self).double())
        return policy

    return widened


class SmallDisk(NamedTuple):
    """A file system of its own, which can be filled up and made read-only."""

    path: Path

    def fill(self, *, leave: int) -> None:
        """Leaves so many bytes, in whole pages."""
        state = os.statvfs(self.path)
        with (self.path / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, max(1, state.f_bavail * state.f_frsize - leave))

    def clear(self) -> None:
        """Makes space again."""
        (self.path / "ballast").unlink(missing_ok=True)

    @contextmanager
    def read_only(self, folder: Path) -> Generator[None]:
        """Makes a folder read-only for as long as the block lasts, for root too."""
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
            yield
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A real file system of 2 MB, in memory, where the machine lets one be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield SmallDisk(path)
    subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared material (specifications, golden vectors, data) that lies next to a developer's checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder.name}/ next to the repository")
    return folder


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., str]:
    """Runs a program to its end in processes on CPUs, connected by gloo; returns what they printed.

    accelerate 1.15's launcher starts one process with --cpu, whatever --num_processes says.
    """

    def run(program: Path, *arguments: object, processes: int = 2, **variables: str) -> str:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", *launcher, str(program), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        done = subprocess.run(command, env=environment, cwd=program.parent, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The Chromium that CHROMIUM names, or the system's."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs {', '.join(names)} or the path of one in CHROMIUM")
    pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
    return path


class Seen(NamedTuple):
    """What a browser shows of a report."""

    tables: int
    pictures: int
    charts: int


@pytest.fixture
def look_at(request: pytest.FixtureRequest) -> Callable[[Path], Seen]:
    """Opens a report in Chromium without a window and holds it to being whole: pictures, no complaint, no request.

    Where there is no Chromium the test is skipped from here on, which is why looking comes last.
    """

    def look(report: Path) -> Seen:
        path = request.getfixturevalue("chromium_path")
        # A driver for each look: as long as one runs, no test can start an event loop.
        from playwright.sync_api import sync_playwright

        requests: list[str] = []
        complaints: list[str] = []
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as browser:
            page = browser.new_page(viewport={"width": 1180, "height": 800})
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(report.as_uri())
            assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            seen = Seen(*(page.locator(kind).count() for kind in ("table", "img", "svg")))
        assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
        assert complaints == []
        return seen

    return look
