"""Lets vLLM's first model runner report what the connector did, in an engine that only encodes.

Its second model runner does; the first one returns from the encoder without the connector's output.
"""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.ec_connector_model_runner_mixin import ECConnectorModelRunnerMixin


def install() -> None:
    """Call it once in each worker, before the model runs."""
    mixin: Any = ECConnectorModelRunnerMixin
    runner: Any = gpu_model_runner
    enter = mixin._get_ec_connector_output
    make = runner.make_empty_encoder_model_runner_output
    latest: list[ECConnectorOutput] = []

    @contextmanager
    def noting(*args: Any, **kwargs: Any) -> Generator[ECConnectorOutput, None, None]:
        with enter(*args, **kwargs) as output:
            latest[:] = [output]
            yield output

    def make_with_report(scheduler_output: Any) -> ModelRunnerOutput:
        made: ModelRunnerOutput = copy.copy(make(scheduler_output))  # the empty one is shared
        (made.ec_connector_output,) = latest  # filled when its context is left
        return made

    mixin._get_ec_connector_output = staticmethod(noting)
    runner.make_empty_encoder_model_runner_output = make_with_report
