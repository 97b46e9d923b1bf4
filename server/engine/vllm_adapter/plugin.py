"""What vLLM calls in each of its processes, by the entry points of the package.

Each part does nothing unless this server has asked for it, so that a plain vLLM in the same
environment stays what it is.
"""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    from server import lifeline
    from server.engine.vllm_adapter import cpu_waits, encode_timing
    from server.telemetry import log

    lifeline.register()
    log.register()
    cpu_waits.register()
    encode_timing.register()


def register_platform() -> None:
    """Entry point of the group `vllm.platform_plugins`. Returns None, which tells vLLM that this is
    not a platform of its own."""
    from server.engine import torchvision_ops

    torchvision_ops.register()
