"""Two processes with half the samples each erase what one with all of them erases."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

PROGRAM = '''
"""Erases by every trained method; the first process writes how the policies draw then."""

import sys
from pathlib import Path

from safetensors.torch import save_file
from test_every_method import METHODS, draw, erased_by

from overpaint.policy import DiffusionPolicy
from overpaint.training import process_state

state = process_state()
assert state.num_processes == int(sys.argv[3])
drawn = {}
for name in ("mace", "esd", "ac", "sa", "receler", "ant", "eraseflow"):
    policy = DiffusionPolicy.from_pretrained(sys.argv[1], device="cpu")
    drawn.setdefault("before", draw(policy))
    erased_by(name, policy).apply(policy)
    drawn[name] = draw(policy)
if state.is_main_process:
    save_file({name: images.contiguous() for name, images in drawn.items()}, Path(sys.argv[2]))
state.destroy_process_group()
'''


@pytest.mark.proof("several processes take the updates of one")
@pytest.mark.slow
def test_two_processes_erase_as_one_does(pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]) -> None:
    program, here = tmp_path / "program.py", Path(__file__).parent
    program.write_text(PROGRAM, encoding="utf-8")
    drawn = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.safetensors"
        torchrun(program, pipeline_dir, file, processes, processes=processes, PYTHONPATH=f"{here.parents[1]}:{here}")
        drawn.append(load_file(file))
    one, two = drawn
    for name in one.keys() - {"before"}:
        changed = (one[name] - one["before"]).norm()
        assert changed > 0, name
        assert (two[name] - one[name]).norm() <= 2e-3 * changed, name  # rounding, which Adam's first steps blow up
