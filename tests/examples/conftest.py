import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from overpaint.policy import DiffusionPolicy
from tests.examples.of_a_user import KINDS, MINE, RECOVERY, YAML
from tests.policy.ldm_layout import in_one_file


@pytest.fixture
def here(pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a user has: a model in one file, a function, prompts, settings."""
    monkeypatch.chdir(tmp_path)
    policy = DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    save_file(in_one_file(policy.unet, policy.vae, policy.text_encoder), "model.safetensors")
    Path("mine.py").write_text(MINE)
    Path("prompts.json").write_text(json.dumps(KINDS))
    Path("mine.yaml").write_text(YAML)
    Path("recovery.yaml").write_text(RECOVERY)
    return tmp_path
