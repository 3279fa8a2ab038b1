"""How long a run is and what its learning rate is at each step."""

from dataclasses import replace

import pytest

from longspan.cli import train
from longspan.cli.config import Train


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = Train(steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [train.learning_rate(step, config) for step in (1, 5, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1])
    assert train.learning_rate(1, replace(config, warmup_steps=0)) == pytest.approx(1.0, rel=1e-3)
    assert train.learning_rate(1, Train(steps=1, warmup_steps=1, learning_rate=1.0)) == 1.0
    for steps in (70, 1_000):  # a resumed run that is made shorter or longer
        other = replace(config, steps=steps, decay_steps=110)
        assert train.learning_rate(60, other) == train.learning_rate(60, config)
        assert train.learning_rate(500, other) == pytest.approx(0.1)


def test_epochs_are_as_many_steps_as_see_the_text_so_often() -> None:
    for epochs, steps in ((0.5, 3), (1.0, 5), (3.0, 15)):
        config = train._for_epochs(Train(epochs=epochs, rows_per_step=2), 10)
        assert (config.steps, config.epochs) == (steps, None)
    assert train._for_epochs(Train(steps=7), 10) == Train(steps=7)
