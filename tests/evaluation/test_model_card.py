"""Model cards, and their way to a hub that a server on this machine plays."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from erasure import Concept, Erasure
from erasure.methods.uce import UCE
from overpaint.evaluation import Comparison, Estimate, ModelCard, Row, push_to_hub
from overpaint.evaluation.report.model_card import PARTS
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.lora_files import base_hashes
from overpaint.policy.weights import ATTENTION

STRIPES = Concept(name="stripes", phrases=("striped", "stripes"), anchor="plain")
ESTIMATES = (Estimate(0.9, 0.01, 0.88, 0.92, 100), Estimate(0.1, 0.02, 0.06, 0.14, 100))
CHANGE = Estimate(-0.8, 0.03, -0.86, -0.74, 100)


def front_matter(text: str) -> dict[str, object]:
    _, data, _ = text.split("---\n", 2)
    return yaml.safe_load(data)


@pytest.fixture
def erasure(make_policy: Callable[..., DiffusionPolicy]) -> Erasure:
    return UCE().erase(make_policy(), STRIPES)


@pytest.fixture
def comparison() -> Comparison:
    row = Row("striped rate", "explicit", True, "lower", "", ESTIMATES, (CHANGE,))
    return Comparison(models=("original", "erased"), config=None, rows=(row,))


@pytest.fixture
def folder(policy: DiffusionPolicy, erasure: Erasure, tmp_path: Path) -> Path:
    """What a recovery writes."""
    folder = tmp_path / "run"
    erasure.save(folder / "erasure")
    erasure.apply(policy)
    policy.save_lora(folder / "lora")
    policy.save_pipeline(folder / "pipeline")
    for name in ("report.html", "metrics.jsonl", "checkpoints/iteration-1/weights.safetensors", ".hidden", "mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    return folder


def test_a_card_says_what_was_erased_how_from_what_and_with_what_result(
    folder: Path, policy: DiffusionPolicy, erasure: Erasure, comparison: Comparison
) -> None:
    card = ModelCard(
        title="Stripes erased, ImageReward raised",
        summary="Rewards & erasure.",
        base_model="CompVis/stable-diffusion-v1-4",
        erasures=[erasure],
        reward="ImageReward with ReFL",
        comparison=comparison,
        notes=["Pictures of 64 pixels."],
        commands=["python examples/refl_erase_nudity.py"],
        settings={"lora": {"rank": 4}},
        license="creativeml-openrail-m",
        tags=["refl"],
    )
    path = card.save(folder)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "README.md"
    assert front_matter(text) == {
        "base_model": "CompVis/stable-diffusion-v1-4",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["overpaint", "concept-erasure", "lora", "refl"],
    }
    assert '**stripes** (said as "striped", "stripes"), towards "plain", by **UCE**' in text
    assert erasure.base is not None
    assert erasure.base in text
    for value in base_hashes(policy.unet).values():
        assert value in text
    assert "| striped rate: explicit | 0.900 ± 0.010 | 0.100 ± 0.020<br>\N{MINUS SIGN}0.800 ± 0.030 |" in text
    assert "The LoRA belongs on the erased model only" in text
    assert "bring the concept back" in text
    for words in ("Rewards & erasure.", "raised afterwards: ImageReward with ReFL", "- Pictures of 64", '"rank": 4'):
        assert words in text


def test_only_parts_that_exist_are_told(folder: Path) -> None:
    card = ModelCard(title="Run", parts={"mine.txt": "A file of | one's own.", "absent.txt": "Not there."})
    rows = [line for line in card.markdown(folder).splitlines() if line.startswith("| `")]
    names = [row.split("`")[1] for row in rows]
    assert names == ["report.html", "pipeline", "lora", "erasure", "metrics.jsonl", "checkpoints", "mine.txt"]
    assert rows[0] == f"| `report.html` | {PARTS['report.html']} |"
    assert rows[-1] == "| `mine.txt` | A file of \\| one's own. |"


def test_a_card_of_little_says_little(tmp_path: Path) -> None:
    text = ModelCard(title="Evaluation").markdown(tmp_path)
    assert front_matter(text) == {"library_name": "diffusers", "tags": ["overpaint"]}
    assert text.split("---\n", 2)[2].strip() == "# Evaluation"
    assert "erased" not in text


def test_words_that_are_no_hub_id_are_no_metadata(tmp_path: Path) -> None:
    text = ModelCard(title="Model", base_model="the embedded model").markdown(tmp_path)
    assert "base_model" not in front_matter(text)
    assert "Made of: the embedded model." in text


def test_the_usage_of_a_card_runs(
    folder: Path, erasure: Erasure, pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ModelCard(title="Run", base_model=str(pipeline_dir), erasures=[erasure]).markdown(folder)
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    namespace: dict[str, DiffusionPolicy] = {}
    exec(code, namespace)
    assert namespace["policy"].lora == LoRAConfig(targets=ATTENTION)
    text = ModelCard(title="Run").markdown(folder / "pipeline")
    assert 'StableDiffusionPipeline.from_pretrained(".")' in text
    assert "model_index.json" in text


# The hub.


class Hub(ThreadingHTTPServer):
    """Takes what the client uploads into `files`; answers everything with `status` where that is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.tokens: set[str | None] = set()
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        answer: dict[str, object] = {}
        if self.path.endswith("/repos/create"):
            hub.created = json.loads(body)
            answer = {"url": f"{hub.address}/me/model"}
        elif self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "0", "commitUrl": f"{hub.address}/me/model/commit/0"}
        self.send_response(hub.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_folder_goes_to_the_hub_without_checkpoints_and_hidden_files(folder: Path, hub: Hub) -> None:
    ModelCard(title="Run").save(folder)
    assert push_to_hub(folder, "me/model", token="secret", endpoint=hub.address) == f"{hub.address}/me/model"
    sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert hub.files.keys() == {name for name in sent if not name.startswith(("checkpoints/", "."))}
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    lora = "lora/pytorch_lora_weights.safetensors"
    assert hub.files[lora] == (folder / lora).read_bytes()
    assert hub.created == {"name": "model", "organization": "me", "visibility": "private"}
    assert hub.tokens == {"Bearer secret"}


def test_what_keeps_a_folder_from_the_hub_is_said(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    with pytest.raises(ValueError, match=r"must hold a model card, README.md, and .*run does not"):
        push_to_hub(folder, "me/model", token="secret", endpoint=hub.address)
    ModelCard(title="Run").save(folder)
    with pytest.raises(ValueError, match="repo_id must be owner/name, got 'model'"):
        push_to_hub(folder, "model", token="secret", endpoint=hub.address)
    with pytest.raises(PermissionError, match="there is none: pass token="):
        push_to_hub(folder, "me/model", endpoint=hub.address)
    hub.status = 401
    with pytest.raises(PermissionError, match="must accept the token for me/model"):
        push_to_hub(folder, "me/model", token="wrong", endpoint=hub.address)
    hub.status = 400
    with pytest.raises(ConnectionError, match="must take the upload to me/model"):
        push_to_hub(folder, "me/model", token="secret", endpoint=hub.address)
    with pytest.raises(ConnectionError, match="must be reachable for the upload to me/model"):
        push_to_hub(folder, "me/model", token="secret", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="must be reachable"):
        push_to_hub(folder, "me/model", token="secret", endpoint=hub.address)
    assert hub.files == {}
