"""How many replicas of a tier there should be on Ray Serve, and what an update may start."""

import math

import pytest

from server.scale.scaling import needed


@pytest.mark.parametrize(
    ("requests", "images", "fronts"),
    [
        (0, [], 0),
        (8, [0.0], 1),
        (9, [0.0], 2),
        (9, [0.8, 0.8, 0.9], 4),  # more by images than by requests
        (40, [0.8, 0.8], 5),
        (1, [4.0], 5),  # one front, whose queue is long
    ],
)
def test_fronts_follow_requests_or_images(
    requests: float, images: list[float], fronts: int
) -> None:
    assert math.ceil(needed(requests, 8, images) - 1e-9) == fronts
