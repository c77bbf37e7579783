import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from evaluation import DrawConfig, Measure, draw, gather, generate, plan, score, shard


class Policy:
    def draw(self, prompts, *, seeds, steps, guidance, eta, batch_size, height, width):
        return torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


state = PartialState(cpu=True)
planned = plan({"explicit": ["a", "b"], "benign": ["c", "d", "e"]})
measures = [Measure("brightness", lambda images, prompts: images.mean(dim=(1, 2, 3)))]
mine = shard(planned, state.process_index, state.num_processes)
drawn = draw(Policy(), mine, DrawConfig(), model="m", progress=False)
whole = score(draw(Policy(), planned, DrawConfig(), model="m", progress=False), measures, progress=False)
assert gather(score(drawn, measures, progress=False), planned) == whole
assert generate(Policy(), planned, Path(sys.argv[1]), model="m", progress=False) == len(mine)
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes_share_the_drawing_and_gather_all_scores(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(program), str(tmp_path / "images")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images" / "m").glob("*.png"))) == 5
