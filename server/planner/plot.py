"""A plan as a picture: what fits and how fast it is, over the tokens of an image."""

from collections.abc import Sequence
from pathlib import Path

from server.errors import CannotPlan
from server.planner.plan import Plan


def draw(title: str, plans: Sequence[Plan], path: Path) -> None:
    """Draw requests at once, images a second and the time to the first token of `plans`, over the
    image tokens of their requests, into `path`, in the format of its suffix.

    Raises:
        CannotPlan: matplotlib is not installed, or does not know the format.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CannotPlan("--plot needs the package matplotlib") from None
    points = sorted(plans, key=lambda plan: plan.workload.image_tokens)
    tokens = [plan.workload.image_tokens for plan in points]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    figure.suptitle(title)
    curves = (
        ("requests at once", [plan.concurrency for plan in points]),
        ("images/s", [plan.images_per_s for plan in points]),
        ("time to first token, s", [plan.ttft.total for plan in points]),
    )
    for axes, (name, values) in zip(figure.subplots(1, len(curves)), curves, strict=True):
        axes.plot(tokens, values, marker="o")
        axes.set(xlabel="image tokens of a request", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise CannotPlan(f"--plot {path}: {error}") from error
