"""Vision-language models in this process: a tiny random LLaVA and a tiny random Qwen-VL, read from folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards.checkpoint import HubFiles
from rewards.preprocess import to_pixels
from rewards.vlm import OFFICIAL, LocalVLM, LocalVLMConfig, VisionLanguageModel, load_processor
from tests.rewards.tiny_vlm import write_llava, write_qwen

IMAGES = torch.rand(6, 3, 40, 56, generator=torch.Generator().manual_seed(0))
QUESTIONS = [
    "What?",
    "Answer concisely: what is going on in this image?",
    "Wie viele Bären? 日本 🐻",
    "",
    "is it <image> or <|im_end|>?",
    "a\nb",
]


@pytest.fixture(scope="module", params=[write_llava, write_qwen], ids=["llava", "qwen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind; read it, do not write to it."""
    return request.param(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> LocalVLM:
    return LocalVLM.load(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "vlm"))


def change(path: Path, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(make(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def test_answers_depend_on_image_and_question(vlm: LocalVLM) -> None:
    answers = vlm.answer(IMAGES, QUESTIONS)
    assert len(set(answers)) == 6
    assert len(set(vlm.answer(IMAGES, ["What?"] * 6))) >= 4
    assert len(set(vlm.answer(IMAGES[:1].expand(6, -1, -1, -1), QUESTIONS))) >= 4


def test_answers_do_not_depend_on_batch_or_order(vlm: LocalVLM, folder: Path) -> None:
    answers = vlm.answer(IMAGES, QUESTIONS)
    assert len({len(answer) for answer in answers}) > 2  # some end before others
    assert [vlm.answer(IMAGES[i : i + 1], QUESTIONS[i : i + 1])[0] for i in range(6)] == answers
    assert vlm.answer(IMAGES.flip(0), QUESTIONS[::-1]) == answers[::-1]
    in_fours = LocalVLM.load(folder, LocalVLMConfig(batch_size=4))
    assert in_fours.answer(IMAGES, QUESTIONS) == answers


def test_answers_are_those_of_transformers_asked_by_hand(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = write_llava(tmp_path)
    processor, auto = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText
    model: Any = auto.from_pretrained(folder)
    expected = []
    for pixels, question in zip(to_pixels(IMAGES[:3]), QUESTIONS, strict=False):
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = processor(images=Image.fromarray(pixels), text=text, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)
        expected.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert LocalVLM.load(folder).answer(IMAGES[:3], QUESTIONS[:3]) == expected


def test_answer_is_the_new_text_alone_and_no_longer_than_allowed(vlm: LocalVLM, folder: Path) -> None:
    answers = vlm.answer(IMAGES, QUESTIONS)
    assert max(len(answer) for answer in answers) in (63, 64)  # one letter is one token
    assert all(answer == answer.strip() and answer.replace(" ", "").isalpha() for answer in answers)
    length = next(n for n in range(1, 64) if any(answer[:n].endswith(" ") for answer in answers))
    short = LocalVLM.load(folder, LocalVLMConfig(max_new_tokens=length)).answer(IMAGES, QUESTIONS)
    assert short == [answer[:length].strip() for answer in answers]


def test_answers_are_greedy_whatever_the_checkpoint_says(copied: Path, vlm: LocalVLM) -> None:
    sampling = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 50, "num_beams": 2}
    change(copied / "generation_config.json", lambda settings: settings | sampling)
    state = torch.get_rng_state()
    assert LocalVLM.load(copied).answer(IMAGES, QUESTIONS) == vlm.answer(IMAGES, QUESTIONS)
    assert torch.equal(torch.get_rng_state(), state)


def test_penalty_on_repetition_of_the_checkpoint_holds(copied: Path, vlm: LocalVLM) -> None:
    change(copied / "generation_config.json", lambda settings: settings | {"repetition_penalty": 5.0})
    assert LocalVLM.load(copied).answer(IMAGES, QUESTIONS) != vlm.answer(IMAGES, QUESTIONS)


def test_images_are_rounded_to_8_bits_and_clamped(vlm: LocalVLM) -> None:
    rounded = torch.from_numpy(to_pixels(IMAGES)).permute(0, 3, 1, 2).float() / 255
    assert vlm.answer(rounded, QUESTIONS) == vlm.answer(IMAGES, QUESTIONS)
    extreme = (IMAGES > 0.5).float()
    assert vlm.answer(3 * extreme - 1, QUESTIONS) == vlm.answer(extreme, QUESTIONS)


def test_images_may_have_any_size(vlm: LocalVLM) -> None:
    for height, width in ((8, 8), (90, 31), (64, 64)):
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        assert len(vlm.answer(image, ["What?"])) == 1


def test_empty_batch_gives_no_answers(vlm: LocalVLM) -> None:
    assert vlm.answer(IMAGES[:0], []) == []


def test_weights_are_frozen_and_stay_in_evaluation_mode(vlm: LocalVLM) -> None:
    assert isinstance(vlm, VisionLanguageModel)
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    torch.nn.Sequential(vlm).train()
    assert not any(module.training for module in vlm.modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_precision_is_that_of_the_file_or_the_one_asked_for(folder: Path, dtype: torch.dtype | None) -> None:
    vlm = LocalVLM.load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in vlm.parameters()} == {dtype or torch.float32}
    answers = vlm.answer(IMAGES[:2].to(torch.float64), QUESTIONS[:2])
    assert all(answer.replace(" ", "").isalpha() for answer in answers)


def test_processor_prepares_images_with_pil_and_has_no_part_for_videos(folder: Path) -> None:
    processor = load_processor(folder)
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert not hasattr(processor, "video_processor")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file_is_named_with_how_to_get_it(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"(?s){name}.*hf download llava-hf/llava-1.5-7b-hf .*--revision"):
        LocalVLM.load(copied)


def test_missing_weights_are_an_error(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    gone = sorted(name for name in tensors if name.endswith("mlp.down_proj.weight"))[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"every tensor of the model, and lack .*mlp\.down_proj\.weight"):
        LocalVLM.load(copied)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LocalVLM.load(copied)


def test_code_of_a_checkpoint_is_not_run(copied: Path, vlm: LocalVLM) -> None:
    ran = copied / "ran"
    (copied / "code.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    names = {"AutoConfig": "code.C", "AutoModelForImageTextToText": "code.M", "AutoProcessor": "code.P"}
    change(copied / "config.json", lambda settings: settings | {"auto_map": names})
    change(copied / "preprocessor_config.json", lambda s: s | {"auto_map": {"AutoImageProcessor": "code.I"}})
    change(copied / "tokenizer_config.json", lambda s: s | {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}})
    assert LocalVLM.load(copied).answer(IMAGES, QUESTIONS) == vlm.answer(IMAGES, QUESTIONS)
    change(copied / "config.json", lambda settings: settings | {"model_type": "unheard-of"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        LocalVLM.load(copied)
    assert not ran.exists()


def test_missing_chat_template_is_an_error(copied: Path) -> None:
    (copied / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="must have a chat template"):
        LocalVLM.load(copied)


@pytest.mark.parametrize("kind", ["bert", "qwen2_audio"])
def test_model_that_takes_no_images_is_refused(copied: Path, kind: str) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"must hold a model of images and text, got one of type '{kind}'"):
        LocalVLM.load(copied)


def test_official_model_is_fetched_by_revision_where_no_folder_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[HubFiles] = []

    def fetch(self: HubFiles) -> Path:
        fetched.append(self)
        return folder

    monkeypatch.setattr(HubFiles, "fetch", fetch)
    assert isinstance(LocalVLM.load(), LocalVLM)
    assert fetched == [OFFICIAL]


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LocalVLMConfig(**{name: 0})


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_pair_of_image_and_question_is_refused(vlm: Any) -> None:
    with pytest.raises(ValueError, match="questions must hold one string for each image, got 1 for 6 images"):
        vlm.answer(IMAGES, ["What?"])
    with pytest.raises(TypeError, match="questions must be a sequence"):
        vlm.answer(IMAGES, "What??")
    with pytest.raises(TypeError, match=r"questions\[1\] must be a valid string, got 3"):
        vlm.answer(IMAGES[:2], ["What?", 3])
    with pytest.raises(TypeError, match="images must be an instance of Float"):
        vlm.answer(IMAGES[0], ["What?"] * 3)
    with pytest.raises(TypeError, match="images must be an instance of Float"):
        vlm.answer(IMAGES[:1].to(torch.uint8), ["What?"])
    with pytest.raises(ValueError, match="images must be finite"):
        vlm.answer(IMAGES[:1] * torch.nan, ["What?"])
