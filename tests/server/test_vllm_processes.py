"""The plugin changes vLLM's own processes only on request, and works in a real engine."""

import json
import multiprocessing
import os
import subprocess
import sys
from typing import Any

from server.engine.arguments import DEMO_MODEL
from tests.starts import ENGINES


def plugin_changes() -> dict[str, Any]:
    """Run in a process like vLLM's: whether our queue waits, step timing and start of processes are
    active, before and after they are requested, and which modules the timing imports."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.utils import sched_yield
    from vllm.v1.executor import multiproc_executor  # every engine process has imported it
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from server.engine.vllm_adapter import cpu_waits, encode_timing, plugin, quick_start  # noqa: F401

    execute_model = WorkerWrapperBase.execute_model

    def changed() -> tuple[bool, bool, bool]:
        waits = shm_broadcast.sched_yield is not sched_yield
        timed = WorkerWrapperBase.execute_model is not execute_model
        starts = multiproc_executor.get_mp_context().Process is quick_start.QuickProcess
        return waits, timed, starts

    os.environ.pop("_SACCADE_PLUGIN", None)  # another test may have set it
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    plugin.register()
    unasked, before = changed(), set(sys.modules)
    plugin.ask(encoder_runs=("ipc:///nonexistent/encoder",))
    plugin.register()
    imported = set(sys.modules) - before
    cpu_waits.ask()
    plugin.ask(quick_start=True)
    plugin.register()
    return {"unasked": unasked, "asked": changed(), "imported": imported}


def test_the_plugin_changes_vllm_only_on_request() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(plugin_changes)
    assert found == {
        "unasked": (False, False, False),
        "asked": (True, True, True),
        "imported": set(),
    }


ENGINE = """
import asyncio, io, json, sys
from PIL import Image
from server.engine.vllm_adapter import plugin
plugin.make_torchvision_importable()
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from server.engine.vllm_adapter.encode_timing import EncodeTimes

PROMPT = "<|im_start|>user\\n{}<|vision_start|><|image_pad|><|vision_end|>" \\
         "What?<|im_end|>\\n<|im_start|>assistant\\n"

async def main():
    runs, ids, asked = [], {}, []
    async with EncodeTimes(lambda *run: runs.append(run)):
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=1024,
            enable_prefix_caching=False))
        send = engine.engine_core.add_request_async

        async def add_request(request):
            ids[request.external_req_id] = request.request_id
            await send(request)

        engine.engine_core.add_request_async = add_request

        async def ask(name, color, text):
            prompt = {"prompt": PROMPT.format(text)}
            if color:
                image = Image.new("RGB", (224, 224), color)
                prompt["multi_modal_data"] = {"image": image}
            else:
                prompt["prompt"] = text
            params = SamplingParams(max_tokens=3, temperature=0)
            async for output in engine.generate(prompt, params, name):
                pass
            times = output.metrics
            asked.append((name, ids[name], times.scheduled_ts, times.first_token_ts))

        await ask("first", "red", "a")
        await asyncio.gather(ask("blue", "blue", "a"), ask("green", "green", "b"))
        await ask("again", "red", "b")
        await ask("text", None, "hello")
        await asyncio.sleep(0.2)
        engine.shutdown()
    print(json.dumps({"runs": runs, "asked": asked}))

asyncio.run(main())
"""


def test_the_real_engine_reports_when_its_encoder_ran() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(DEMO_MODEL)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | ENGINES,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    asked = {name: times for name, *times in report["asked"]}
    encoded: dict[str, tuple[float, float]] = {}
    for request_ids, start_s, end_s in report["runs"]:
        assert start_s < end_s
        for request_id in request_ids:
            assert request_id not in encoded
            encoded[request_id] = start_s, end_s
    assert set(encoded) == {asked[name][0] for name in ("first", "blue", "green")}
    for request_id, scheduled_s, first_token_s in asked.values():
        if request_id in encoded:
            start_s, end_s = encoded[request_id]
            assert scheduled_s < start_s < end_s < first_token_s
