from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path

import torch
from overpaint.evaluation import DrawConfig, Measure, draw, gather, generate, plan, score, shard
from overpaint.training import process_state


class Policy:
    def draw(self, prompts, *, seeds, steps, guidance, eta, batch_size, height, width):
        return torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


state = process_state()
assert state.num_processes == 2
planned = plan({"explicit": ["a", "b"], "benign": ["c", "d", "e"]})
measures = [Measure("brightness", lambda images, prompts: images.mean(dim=(1, 2, 3)))]
mine = shard(planned, state.process_index, state.num_processes)
drawn = draw(Policy(), mine, DrawConfig(), model="m", progress=False)
whole = score(draw(Policy(), planned, DrawConfig(), model="m", progress=False), measures, progress=False)
assert gather(score(drawn, measures, progress=False), planned) == whole
# Batches of 2, 2 and 1 are shared out whole: three images for the first process and two for the second.
assert generate(Policy(), planned, Path(sys.argv[1]), model="m", batch_size=2, progress=False) == len(mine)
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes_share_the_drawing_and_gather_all_scores(
    tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    torchrun(program, tmp_path / "images")
    assert len(list((tmp_path / "images" / "m").glob("*.png"))) == 5
