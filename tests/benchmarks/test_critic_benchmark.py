"""The critic's benchmark: what counts as reached, and that a whole run is not made again."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import critic


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.51, 2), (0.31, 3), (0.1, None)],
)
def test_rate_is_reached_by_the_mean_of_the_last_rounds(rate: float, expected: int | None) -> None:
    assert critic.rounds_until([0.6, 0.4, 0.2, 0.4, 0.2], rate, 2) == expected


def test_it_compares_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {
        "seeds": (0,),
        "samples_per_round": 4,
        "prompts": 2,
        "window": 1,
        "output_dir": tmp_path,
    }
    short = critic.main(critic.Config(rounds=1, **settings))
    written = (tmp_path / "critic-0" / "metrics.jsonl").read_bytes()
    again = critic.main(critic.Config(rounds=1, **settings))
    assert again == short
    assert (tmp_path / "critic-0" / "metrics.jsonl").read_bytes() == written
    whole = critic.main(critic.Config(rounds=2, **settings))
    assert {name: [one.rates[:1] for one in found] for name, found in whole.items()} == {
        name: [one.rates for one in found] for name, found in short.items()
    }
    # The same samples are drawn at first, whatever they are compared with.
    assert whole["prompt"][0].rates[0] == whole["critic"][0].rates[0]
    assert len(whole["critic"][0].rates) == 2
    printed = capsys.readouterr().out
    assert "  prompt  " in printed
    assert "  critic  " in printed
