"""`vllm bench serve` of vLLM's CPU build: python -m benchmarks.vllm_bench FLAGS

The command `vllm` of that build fails, because it asks for the version of a package named `vllm`.
"""

import sys

from server.engine.vllm_adapter import plugin

plugin.make_torchvision_importable()  # before vLLM imports it

from vllm.benchmarks import serve  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402


def main(*flags: str) -> None:
    parser = FlexibleArgumentParser(prog="vllm bench serve")
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(flags))


if __name__ == "__main__":
    main(*sys.argv[1:])
