"""Tokens of OpenVLA as numbers."""

import numpy as np
import pytest

from saccade_client.actions import BINS, VOCABULARY, actions


def test_tokens_stand_for_the_middles_of_intervals() -> None:
    """As OpenVLA computes them, with numpy."""
    edges = np.linspace(-1, 1, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    tokens = np.arange(VOCABULARY - BINS, VOCABULARY)
    expected = middles[np.clip(VOCABULARY - tokens - 1, 0, len(middles) - 1)]
    np.testing.assert_allclose(actions(tokens.tolist()), expected, atol=1e-12)


def test_statistics_give_the_units_of_a_robot() -> None:
    """All but the gripper, which is masked."""
    statistics = {"q01": [-0.1, 0.0], "q99": [0.3, 1.0], "mask": [True, False]}
    first, last = VOCABULARY - 1, VOCABULARY - BINS
    moved, gripper = actions([first, last], statistics)
    assert moved == pytest.approx(-0.1 + 0.4 * (0.5 / 255))
    assert gripper == pytest.approx(1 - 1 / 255)


@pytest.mark.parametrize("token", [0, VOCABULARY - BINS - 1, VOCABULARY])
def test_other_tokens_are_no_actions(token: int) -> None:
    with pytest.raises(ValueError, match="no action"):
        actions([token])


def test_statistics_of_another_robot_are_refused() -> None:
    with pytest.raises(ValueError, match="7 dimensions"):
        actions([VOCABULARY - 1], {"q01": [0.0] * 7, "q99": [1.0] * 7})
