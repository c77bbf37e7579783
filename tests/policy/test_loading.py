import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.policy import DiffusionPolicy


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


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_pipeline_of_another_class_is_refused(pipeline_copy: Path, name: str) -> None:
    change(pipeline_copy / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=f"must be a StableDiffusionPipeline, and .* is a {name}"):
        DiffusionPolicy.from_pretrained(pipeline_copy)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "nowhere", "a/b/c", Path("nowhere/at_all")])
def test_folder_that_is_not_there_is_refused(path: str | Path) -> None:
    with pytest.raises(ValueError, match="must be a folder in diffusers' layout or a hub id"):
        DiffusionPolicy.from_pretrained(path)


def test_hub_id_is_asked_for_its_class_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked: list[str] = []

    def load_config(name: str) -> dict[str, str]:
        asked.append(name)
        return {"_class_name": "StableDiffusionXLPipeline"}

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    with pytest.raises(ValueError, match="stabilityai/sdxl is a StableDiffusionXLPipeline"):
        DiffusionPolicy.from_pretrained("stabilityai/sdxl")
    assert asked == ["stabilityai/sdxl"]


def test_hub_id_goes_to_diffusers_without_safety_checker(pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        given.update(options, name=name)
        return pipeline

    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "load_config", lambda name: {"_class_name": "StableDiffusionPipeline"}
    )
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    policy = DiffusionPolicy.from_pretrained("CompVis/stable-diffusion-v1-4", device="cpu")
    assert policy.unet is pipeline.unet
    assert given["name"] == "CompVis/stable-diffusion-v1-4"
    assert given["dtype"] == torch.float32
    assert given["safety_checker"] is given["feature_extractor"] is None


def test_unknown_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def load_config(name: str) -> dict[str, str]:
        raise OSError("no such repository")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    with pytest.raises(ValueError, match="must be a folder or a hub id of a pipeline, got 'nobody/nothing'"):
        DiffusionPolicy.from_pretrained("nobody/nothing")


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
    with pytest.raises(ValueError, match="must be a StableDiffusionPipeline, got a object"):
        DiffusionPolicy(other)
    pipeline = policy.to_pipeline()
    pipeline.unet = policy.unet
    with pytest.raises(ValueError, match="the UNet must carry no adapter"):
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
    assert v_policy.prediction_type == "v_prediction"
    half = make_policy(dtype=torch.bfloat16)
    assert half.prediction_type == "epsilon"
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
