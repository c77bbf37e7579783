import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.policy import DiffusionPolicy, check_checkpoint
from overpaint.policy.checkpoint_files import variants


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_folder_without_a_part_is_refused(pipeline_copy: Path, part: str) -> None:
    shutil.rmtree(pipeline_copy / part)
    with pytest.raises(ValueError, match=f"must hold {part}/, and .*pipeline does not"):
        DiffusionPolicy.from_pretrained(pipeline_copy)


def test_folder_without_an_index_is_refused(pipeline_copy: Path) -> None:
    (pipeline_copy / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"must hold model_index.json, and .*pipeline does not"):
        DiffusionPolicy.from_pretrained(str(pipeline_copy))


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLInpaintPipeline",
        "FluxKontextPipeline",
        "FluxFillPipeline",
        "Flux2Pipeline",
    ],
)
def test_pipeline_of_another_class_is_refused(pipeline_copy: Path, name: str) -> None:
    change(pipeline_copy / "model_index.json", _class_name=name)
    with pytest.raises(
        ValueError, match=rf"must be one of StableDiffusionPipeline, .*, FluxPipeline, and .* is a {name}"
    ):
        DiffusionPolicy.from_pretrained(pipeline_copy)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "nowhere", "a/b/c", Path("nowhere/at_all")])
def test_folder_that_is_not_there_is_refused(path: str | Path) -> None:
    with pytest.raises(ValueError, match="must be a folder in diffusers' layout or a hub id"):
        DiffusionPolicy.from_pretrained(path)


@pytest.fixture
def publish(pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts folders on a hub, by their ids, and returns the list of what it was asked for."""

    def publish(asked: list[str] | None = None, listing: bool = True, **folders: Path) -> list[str]:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

        requests: list[str] = []
        at = {name.replace("__", "/"): folder for name, folder in folders.items()}

        def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
            requests.append(name)
            if name not in at:
                raise LocalEntryNotFoundError("not in the cache")
            return str(at[name])

        def list_repo_files(name: str) -> list[str]:
            if not listing:
                raise OfflineModeIsEnabled("offline")
            return [file.relative_to(at[name]).as_posix() for file in at[name].glob("**/*") if file.is_file()]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
        return requests

    return publish


@pytest.mark.parametrize("listing", [True, False])
def test_hub_id_is_asked_for_its_class_before_it_is_loaded(
    listing: bool, pipeline_copy: Path, publish: Callable[..., list[str]]
) -> None:
    change(pipeline_copy / "model_index.json", _class_name="PixArtSigmaPipeline")
    asked = publish(stabilityai__sdxl=pipeline_copy, listing=listing)
    with pytest.raises(ValueError, match="stabilityai/sdxl is a PixArtSigmaPipeline"):
        DiffusionPolicy.from_pretrained("stabilityai/sdxl")
    assert asked == ["stabilityai/sdxl"]


@pytest.mark.parametrize("listing", [True, False])
def test_hub_id_goes_to_diffusers_without_safety_checker(
    listing: bool, pipeline_dir: Path, publish: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        given.update(options, name=name)
        return pipeline

    publish(**{"CompVis__stable-diffusion-v1-4": pipeline_dir}, listing=listing)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    policy = DiffusionPolicy.from_pretrained("CompVis/stable-diffusion-v1-4", device="cpu")
    assert policy.unet is pipeline.unet
    assert given["name"] == "CompVis/stable-diffusion-v1-4"
    assert given["dtype"] == torch.float32
    assert given["safety_checker"] is given["feature_extractor"] is None


def test_hub_that_cannot_be_reached_is_told_from_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with pytest.raises(
        ValueError, match="hub must be within reach for 'nobody/nothing', which its cache does not hold"
    ):
        DiffusionPolicy.from_pretrained("nobody/nothing")  # the tests are offline
    for kind, words in (
        (RepositoryNotFoundError, "must be a folder or a hub id of a pipeline, got 'nobody/nothing'"),
        (GatedRepoError, "must be one that this account may read, and 'nobody/nothing' is not"),
    ):
        error = kind("no", response=httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co")))

        def snapshot_download(name: str, *, allow_patterns: list[str], error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ValueError, match=words):
            check_checkpoint("nobody/nothing")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="got 'no body/nothing'"):
        check_checkpoint("no body/nothing")


def test_cached_snapshot_serves_where_the_hub_does_not(
    pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "models--somebody--tiny"
    shutil.copytree(pipeline_dir, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = DiffusionPolicy.from_pretrained("somebody/tiny", device="cpu")
    expected = DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    assert torch.equal(found.unet.conv_in.weight, expected.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["unet/W.safetensors", "vae/W.safetensors", "text_encoder/model.safetensors"], {}),
        (["unet/W.bin", "vae/W.bin", "text_encoder/pytorch_model.bin"], {}),
        (
            ["unet/W.fp16.safetensors", "vae/W.fp16.bin", "text_encoder/model.fp16.safetensors"],
            {"unet": "fp16", "vae": "fp16", "text_encoder": "fp16"},
        ),
        (
            ["unet/W.fp16.bin", "unet/W.safetensors", "vae/W.fp16.safetensors", "text_encoder/model.safetensors"],
            {"vae": "fp16"},
        ),
        (
            [
                "unet/W.safetensors.index.fp16.json", "unet/W.fp16-00001-of-00002.safetensors",
                "unet/W.fp16-00002-of-00002.safetensors", "vae/W.safetensors.index.json",
                "vae/W-00001-of-00001.safetensors", "text_encoder/model.fp16-00001-of-00001.safetensors",
            ],
            {"unet": "fp16", "text_encoder": "fp16"},
        ),
        (
            ["unet/W.bf16.safetensors", "unet/W.non_ema.safetensors", "vae/W.bin", "text_encoder/model.bin"],
            {"unet": "bf16"},
        ),
        (["unet/W.bin", "vae/W.bin", "text_encoder/pytorch_model.fp16.bin", "text_encoder/flax_model.bin"],
         {"text_encoder": "fp16"}),
    ],
)  # fmt: skip
def test_variant_is_decided_part_by_part(files: list[str], expected: dict[str, str]) -> None:
    named = [file.replace("W", "diffusion_pytorch_model") for file in files]
    assert variants([*named, "model_index.json", "safety_checker/model.fp16.safetensors"], "here") == expected


@pytest.mark.parametrize(
    ("left", "found"), [(None, "no file"), ("diffusion_pytorch_model.non_ema.safetensors", "diff.*non_ema.safetensors")]
)
def test_part_without_weights_is_refused(left: str | None, found: str, pipeline_copy: Path) -> None:
    weights = pipeline_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink() if left is None else weights.rename(weights.with_name(left))
    with pytest.raises(ValueError, match=f"pipeline must hold the weights of unet/, got {found}"):
        check_checkpoint(pipeline_copy)


def test_parts_in_half_precision_sharded_or_whole_are_loaded_beside_others(pipeline_dir: Path, tmp_path: Path) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    pipeline.save_pretrained(tmp_path)
    for part in ("unet", "text_encoder"):
        shutil.rmtree(tmp_path / part)
        half = getattr(pipeline, part).half()
        half.save_pretrained(tmp_path / part, variant="fp16", max_shard_size="50KB" if part == "unet" else "5GB")
    assert len(list((tmp_path / "unet").glob("*.fp16-*.safetensors"))) > 1
    assert (tmp_path / "text_encoder" / "model.fp16.safetensors").is_file()

    found = DiffusionPolicy.from_pretrained(tmp_path, device="cpu")
    whole = DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, part).state_dict()
        for name, value in getattr(found, part).state_dict().items():
            rounded = expected[name] if part == "vae" else expected[name].half().float()
            assert torch.equal(value, rounded)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe"])
def test_folder_of_another_pipeline_around_the_same_parts_is_loaded(name: str, pipeline_copy: Path) -> None:
    change(pipeline_copy / "model_index.json", _class_name=name)
    check_checkpoint(pipeline_copy)
    DiffusionPolicy.from_pretrained(pipeline_copy, device="cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 9}, r"must take 4 channels of latents and nothing else, got 9 \(of an inpainting model\)"),
        ({"in_channels": 8}, "got 8"),
        ({"addition_embed_type": "text_time"}, "got one that reads SDXL's pooled text and sizes"),
        ({"time_cond_proj_dim": 256}, "got one that reads the scale of guidance"),
    ],
)
def test_unet_that_reads_more_is_refused_by_its_configuration(
    changed: dict[str, Any], message: str, pipeline_copy: Path
) -> None:
    change(pipeline_copy / "unet" / "config.json", **changed)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(pipeline_copy)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"_class_name": "DDIMScheduler", "clip_sample": True},
            r"clip_sample must be False, .* set it in scheduler_conf",
        ),
        ({"prediction_type": "flow"}, "prediction_type must be one of"),
        ({"_class_name": "MyScheduler"}, "must be one of diffusers, got MyScheduler"),
    ],
)
def test_scheduler_is_checked_before_weights_are_loaded(
    changed: dict[str, Any], message: str, pipeline_copy: Path
) -> None:
    check_checkpoint(pipeline_copy)
    change(pipeline_copy / "scheduler" / "scheduler_config.json", **changed)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(pipeline_copy)


def test_damaged_configuration_is_refused_by_name(pipeline_copy: Path) -> None:
    (pipeline_copy / "unet" / "config.json").write_text('{"in_channels": ')
    with pytest.raises(ValueError, match=r"pipeline/unet/config\.json must be JSON, got Expecting value"):
        check_checkpoint(pipeline_copy)
    (pipeline_copy / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must hold unet/config.json, and .*pipeline does not"):
        check_checkpoint(pipeline_copy)


def test_home_is_expanded(pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pipeline_dir.parent))
    for path in (f"~/{pipeline_dir.name}", Path("~") / pipeline_dir.name):
        check_checkpoint(path)
        DiffusionPolicy.from_pretrained(path, device="cpu")
    with pytest.raises(ValueError, match=f"got {pipeline_dir.parent}/nowhere"):
        check_checkpoint("~/nowhere")


def test_unet_of_another_task_is_refused(pipeline_dir: Path) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="must take 4 channels of latents and nothing else, got 9"):
        DiffusionPolicy(pipeline)


def test_unknown_prediction_is_refused(pipeline_copy: Path) -> None:
    change(pipeline_copy / "scheduler" / "scheduler_config.json", prediction_type="flow")
    with pytest.raises(ValueError, match=r"prediction_type must be one of .*, got 'flow'"):
        DiffusionPolicy.from_pretrained(pipeline_copy)


def test_what_is_no_pipeline_or_carries_an_adapter_is_refused(policy: DiffusionPolicy) -> None:
    other: Any = object()
    with pytest.raises(ValueError, match=r"must be one of StableDiffusionPipeline, .*, got a object"):
        DiffusionPolicy(other)
    pipeline = policy.to_pipeline()
    pipeline.unet = policy.unet
    with pytest.raises(ValueError, match=r"the UNet's layer .* must carry no adapter"):
        DiffusionPolicy(pipeline)


def test_process_takes_its_own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    from overpaint.policy.loading import default_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert default_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_prediction_type_and_precision_come_from_checkpoint_and_caller(
    v_policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    assert v_policy.process.prediction_type == "v_prediction"
    half = make_policy(dtype=torch.bfloat16)
    assert half.process.prediction_type == "epsilon"
    assert (
        half.dtype == half.vae.dtype == half.text_encoder.dtype == half.encode(["a cat"]).tokens.dtype == torch.bfloat16
    )


def test_importing_the_package_imports_no_heavy_library() -> None:
    program = (
        "import sys, overpaint.policy\n"
        "heavy = {'diffusers', 'transformers', 'peft', 'accelerate', 'safetensors', 'numpy.f2py'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_loading_draws_no_bars_and_leaves_the_libraries_as_they_were(
    pipeline_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert of_diffusers.is_progress_bar_enabled()
    assert of_transformers.is_progress_bar_enabled()


def test_a_program_that_loads_and_saves_is_told_nothing_by_the_libraries(tmp_path: Path) -> None:
    program = (
        "from overpaint import LoRAConfig, tinyworld\n"
        f"tinyworld.load_policy(lora=LoRAConfig(rank=2)).save_pipeline({str(tmp_path / 'saved')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
