"""The server's use of vLLM beyond its public interfaces, as statements about vLLM's source.

They are checked without importing vLLM, so that versions that cannot be imported here can also be
checked (`tests/contracts_next.py`). `docs/vllm.md` explains the purpose of each.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

SERVER = Path(__file__).parents[1] / "server"


@dataclass(frozen=True)
class Contract:
    """`name` exists in `module`: a class, a function, an attribute, or one of these in a class.

    `takes` are the parameters that are passed or overridden, in order; more may follow if they
    have defaults. `calls` are pieces of source that a function must contain, if the order of
    vLLM's steps matters.
    """

    module: str
    name: str
    takes: tuple[str, ...] | None = None
    calls: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.module}.{self.name}"


def _in(module: str, *names: str) -> list[Contract]:
    return [Contract(module, name) for name in names]


_PROCESSOR = "multimodal.processing.processor"
_BASE = "BaseMultiModalProcessor"

CONTRACTS = [
    # The files of Swagger UI.
    Contract(
        "entrypoints.serve.instrumentator.offline_docs",
        "attach_router",
        calls=(
            "pathlib.Path(__file__).parent / 'static'",
            "'/static/swagger-ui-bundle.js'",
            "'/static/swagger-ui.css'",
        ),
    ),
    # The path of a request to the engine core.
    Contract("v1.engine.core_client", "AsyncMPClient.add_request_async", ("self", "request")),
    Contract(
        "v1.engine.async_llm",
        "AsyncLLM.add_request",
        calls=(
            "self.output_processor.add_request(child_request, prompt_text, parent_request, idx, "
            "queue)",
            "await self.engine_core.add_request_async(child_request)",
        ),
    ),
    *_in(
        "v1.engine",
        "EngineCoreRequest.request_id",
        "EngineCoreRequest.external_req_id",
        "EngineCoreRequest.mm_features",
        "EngineCoreRequest.cache_salt",
        "EngineCoreRequest.lora_request",
        "EngineCoreOutput.request_id",
        "EngineCoreOutput.new_token_ids",
        "EngineCoreOutput.finish_reason",
        "EngineCoreOutput.ec_transfer_params",
    ),
    Contract(
        "v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        ("self", "engine_core_outputs"),
        calls=("self.do_tracing(engine_core_output, req_state, iteration_stats)",),
    ),
    Contract(
        "v1.engine.output_processor",
        "OutputProcessor.do_tracing",
        ("self", "engine_core_output", "req_state", "iteration_stats"),
    ),
    *_in(
        "v1.engine.output_processor",
        "OutputProcessor.request_states",
        "OutputProcessor.parent_requests",
        "OutputProcessor.get_num_unfinished_requests",
        "RequestState.parent_req",
        "RequestState.request_index",
        "RequestState.stats",
    ),
    *_in("v1.engine.parallel_sampling", "ParentRequest.sampling_params"),
    *_in("v1.metrics.stats", "RequestStateStats.scheduled_ts", "RequestStateStats.first_token_ts"),
    *_in("v1.engine.input_processor", "InputProcessor.mm_encoder_cache_size"),
    *_in("v1.engine.core_client", "AsyncMPClient.reset_encoder_cache_async"),
    Contract(
        "v1.engine.core_client",
        "AsyncMPClient._ensure_output_queue_task",
        ("self",),
        calls=(
            "resources.output_queue_task is not None",
            "output_socket = resources.output_socket",
            "frames = await output_socket.recv_multipart(copy=False)",
        ),
    ),
    Contract(
        "v1.engine.core_client",
        "AsyncMPClient._send_input_message",
        ("self", "message", "engine"),
        calls=("return self.input_socket.send_multipart((engine,) + message, copy=False)",),
    ),
    # Several front ends as clients of the same engines.
    Contract(
        "v1.engine.core_client",
        "MPClient.__init__",
        calls=(
            "sync_input_socket = zmq.Socket.shadow(self.input_socket)",
            "identity, payload = sync_input_socket.recv_multipart()",
            "client_addresses.get('stats_update_address')",
        ),
    ),
    Contract(
        "v1.engine.core_client",
        "_process_utility_output",
        calls=("utility_results.pop(output.call_id)",),
    ),
    Contract("v1.engine.core_client", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    *_in("v1.engine.core_client", "AsyncMPClient.reset_mm_cache_async", "MPClient.shutdown"),
    *_in("v1.engine.core_client", "MPClient.resources", "MPClient.utility_results"),
    *_in("v1.engine.core_client", "BackgroundResources.engine_dead"),
    Contract(
        "v1.engine.core",
        "EngineCore.__init__",
        calls=("self.mm_receiver_cache = engine_receiver_cache_from_config(vllm_config)",),
    ),
    Contract(
        "v1.engine.core",
        "EngineCore.preprocess_add_request",
        ("self", "request"),
        calls=("self.mm_receiver_cache.get_and_update_features(request.mm_features)",),
    ),
    Contract("v1.engine.core", "EngineCore.abort_requests", ("self", "request_ids")),
    *_in("v1.core.sched.scheduler", "Scheduler.requests"),
    *_in("v1.request", "Request.client_index"),
    *_in("v1.engine", "EngineCoreRequest.client_index"),
    *_in("v1.engine.utils", "CoreEngineProcManager.failed_proc_name"),
    *_in("v1.engine.utils", "CoreEngineProcManager.monitor_engine_liveness"),
    # Another core for an engine whose core has died.
    Contract(
        "v1.engine.utils",
        "launch_core_engines",
        ("vllm_config", "executor_class", "log_stats", "addresses"),
    ),
    *_in("v1.engine.utils", "CoreEngineProcManager.processes", "CoreEngineProcManager.shutdown"),
    *_in("v1.engine.core_client", "BackgroundResources.engine_manager"),
    *_in("v1.engine.core_client", "MPClient.start_engine_core_monitor"),
    *_in("v1.engine.async_llm", "AsyncLLM.engine_core", "AsyncLLM.output_handler"),
    *_in("v1.engine.async_llm", "AsyncLLM._run_output_handler"),
    Contract(
        "v1.metrics.loggers",
        "StatLoggerManager.record",
        ("self", "scheduler_stats", "iteration_stats"),
    ),
    # Engines in other processes.
    Contract(
        "v1.engine.core_client",
        "EngineCoreClient.make_async_mp_client",
        ("vllm_config", "executor_class", "log_stats"),
        calls=("return AsyncMPClient(*client_args, renderer=renderer)",),
    ),
    Contract(
        "v1.engine.core_client",
        "MPClient._apply_ready_response",
        ("self", "payload"),
        calls=(
            "self._effective_attention_block_sizes.add",
            "self._kv_event_sources[response.data_parallel_rank]",
        ),
    ),
    Contract(
        "v1.engine.core_client",
        "AsyncMPClient._send_input",
        calls=("(request_type.value, *self.encoder.encode(request))",),
    ),
    Contract(
        "v1.engine.core_client", "AsyncMPClient.abort_requests_async", ("self", "request_ids")
    ),
    Contract("v1.engine.core_client", "AsyncMPClient.call_utility_async", ("self", "method")),
    Contract("v1.engine.core_client", "AsyncMPClient.get_supported_tasks_async", ("self",)),
    Contract("v1.engine.core_client", "AsyncMPClient.get_output_async", ("self",)),
    Contract("v1.engine.core_client", "AsyncMPClient.is_sleeping_async", ("self",)),
    *_in("v1.engine.core_client", "MPClient.core_engine"),
    *_in(
        "v1.engine",
        "EngineCoreOutputs.outputs",
        "EngineCoreOutputs.scheduler_stats",
        "EngineCoreOutputs.timestamp",
        "EngineCoreOutputs.weight_version",
    ),
    Contract("v1.serial_utils", "MsgpackDecoder.decode", ("self", "bufs")),
    Contract("v1.serial_utils", "MsgpackEncoder._encode_mm_item", ("self", "item")),
    Contract(
        "multimodal.cache.factories",
        "_get_cache_type",
        calls=("parallel_config._api_process_count == 1", "mm_config.mm_processor_cache_gb <= 0"),
    ),
    # The two halves of the processor cache.
    Contract("multimodal.cache.lru", "LruKeyReplicatedSenderCache._cache"),
    Contract("multimodal.cache.base", "MultiModalProcessorOnlyCache._cache"),
    Contract("multimodal.cache.shm", "ShmObjectStoreSenderCache._shm_cache"),
    Contract("multimodal.cache.base", "MultiModalCache.get_item_size", ("cls", "value")),
    Contract(
        "multimodal.cache.base",
        "MultiModalProcessorCacheItemMetadata.__init__",
        ("self", "item", "prompt_updates"),
        calls=("self.item_size = MultiModalCache.get_item_size(item)",),
    ),
    Contract(
        "multimodal.cache.lru",
        "LruKeyReplicatedSenderCache.get_and_update_item",
        calls=("MultiModalProcessorCacheItemMetadata(*mm_item)",),
    ),
    Contract(
        "multimodal.cache.base",
        "BaseMultiModalReceiverCache.get_and_update_features",
        calls=("self.touch_receiver_cache_item", "self.get_and_update_item"),
    ),
    *_in(
        "multimodal.cache.base",
        "BaseMultiModalProcessorCache.is_cached_item",
        "BaseMultiModalProcessorCache.get_and_update_item",
        "BaseMultiModalProcessorCache.touch_sender_cache_item",
        "BaseMultiModalProcessorCache.release_sender_touches",
        "BaseMultiModalProcessorCache.invalidate",
        "BaseMultiModalProcessorCache.validate_input_item",
        "BaseMultiModalProcessorCache.make_stats",
    ),
    # What goes to the engine core.
    Contract(
        "v1.serial_utils",
        "MsgpackEncoder.enc_hook",
        ("self", "obj"),
        calls=("isinstance(obj, MultiModalKwargsItem)", "self._encode_mm_item(obj)"),
    ),
    *_in(
        "v1.serial_utils",
        "MsgpackEncoder._encode_mm_field",
        "MsgpackEncoder.aux_buffers",
        "MsgpackEncoder.encoder",
        "MsgpackEncoder.oob_tensor_consumer",
        "MsgpackEncoder.size_threshold",
        "CUSTOM_TYPE_RAW_VIEW",
    ),
    *_in("v1.engine.core_client", "MPClient.encoder"),
    # The renderer.
    Contract(
        "renderers.hf",
        "HfRenderer.__init__",
        ("self", "config", "tokenizer"),
        calls=(
            "self._apply_chat_template_async = make_async(safe_apply_chat_template, "
            "executor=self._executor)",
        ),
    ),
    Contract(
        "renderers.hf",
        "HfRenderer.render_messages_async",
        ("self", "messages", "params"),
        calls=(
            "self._render_with_timeout(self._apply_chat_template_async(",
            "**chat_template_kwargs",
        ),
    ),
    Contract(
        "renderers.hf",
        "HfRenderer._render_with_timeout",
        ("self", "coro"),
        calls=("envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "self._replace_executor()"),
    ),
    *_in("renderers.base", "BaseRenderer._executor"),
    # The media of a conversation.
    Contract(
        "renderers.chat_utils",
        "parse_chat_messages_async",
        calls=("AsyncMultiModalItemTracker(", "mm_tracker.resolve_items()"),
    ),
    Contract(
        "renderers.chat_utils",
        "AsyncMultiModalItemTracker.resolve_items",
        ("self",),
        calls=("*(item() for item in items)", "_resolve_items(", "self._modality_order"),
    ),
    Contract(
        "renderers.chat_utils",
        "_resolve_items",
        ("items_by_modality", "mm_processor", "modality_order"),
    ),
    *_in(
        "renderers.chat_utils",
        "BaseMultiModalItemTracker._items_by_modality",
        "BaseMultiModalItemTracker.model_cls",
        "BaseMultiModalItemTracker.mm_processor",
    ),
    Contract(
        "renderers.base",
        "BaseRenderer._tokenize_singleton_prompt_async",
        ("self", "prompt", "params"),
        calls=(
            "params.apply_pre_tokenization(self.tokenizer, prompt)",
            "self._tokenize_prompt_async(prompt, params)",
        ),
    ),
    Contract("renderers.mistral", "MistralRenderer.__init__", ("self", "config", "tokenizer")),
    Contract("renderers.kimi_k3", "KimiK3Renderer.__init__", ("self", "config", "tokenizer")),
    Contract(
        "renderers.deepseek_v4", "DeepseekV4Renderer.__init__", ("self", "config", "tokenizer")
    ),
    Contract(
        "renderers.mistral",
        "MistralRenderer.render_messages_async",
        ("self", "messages", "params"),
        calls=(
            "self._apply_chat_template_async(tokenizer, messages, "
            "**params.get_apply_chat_template_kwargs())",
        ),
    ),
    *_in("multimodal.parse", "MultiModalDataParser._parse_vision_chunk_data"),
    Contract(
        "renderers.chat_utils",
        "_resolve_vision_chunk_items",
        calls=("hasattr(data, 'media')", "processed_chunks.append(data)"),
    ),
    Contract(
        "renderers.base",
        "BaseRenderer.render_chat_async",
        ("self", "conversations", "chat_params", "tok_params"),
        calls=(
            "self.render_messages_async(conversation, chat_params)",
            "self.tokenize_prompts_async(dict_prompts, tok_params)",
            "prompt_extras['media_io_kwargs'] = chat_params.media_io_kwargs or {}",
            "self._apply_prompt_extras(tok_prompts, prompt_extras)",
            "self.process_for_engine_async(p, arrival_time, skip_mm_cache=skip_mm_cache, "
            "tok_params=tok_params)",
        ),
    ),
    Contract(
        "renderers.base",
        "BaseRenderer.__init__",
        calls=("make_async(self._tokenize_prompt", "make_async(self._process_multimodal"),
    ),
    Contract("renderers.base", "BaseRenderer._tokenize_prompt", ("self", "prompt", "params")),
    Contract("renderers.base", "BaseRenderer.get_eos_token_id", ("self",)),
    Contract(
        "v1.metrics.loggers",
        "PrometheusStatLogger.__init__",
        calls=("self._histogram_cls(", "self._counter_cls(", "self._gauge_cls("),
    ),
    Contract(
        "renderers.base",
        "BaseRenderer._process_multimodal",
        ("self", "prompt", "mm_data", "mm_uuids", "mm_processor_kwargs", "media_io_kwargs"),
    ),
    Contract(
        "renderers.base",
        "BaseRenderer._process_tokens_async",
        calls=("self._process_multimodal_async(",),
    ),
    *_in(
        "renderers.base",
        "BaseRenderer._process_multimodal_async",
        "BaseRenderer._mm_executor",
        "BaseRenderer._mm_processor_cache",
        "BaseRenderer._mm_processor_only_cache",
        "BaseRenderer.update_mm_cache_stats",
    ),
    # The start of vLLM's processes.
    *_in("v1.engine.utils", "get_mp_context"),
    *_in("v1.executor.multiproc_executor", "get_mp_context"),
    Contract(
        "v1.engine.utils",
        "CoreEngineProcManager.__init__",
        calls=("context = get_mp_context()", "context.Process(target=EngineCoreProc."),
    ),
    Contract(
        "v1.executor.multiproc_executor",
        "WorkerProc.make_worker_process",
        calls=("context = get_mp_context()", "context.Process(target=WorkerProc.worker_main"),
    ),
    # Streamed answers.
    Contract(
        "entrypoints.anthropic.serving",
        "AnthropicServingMessages.message_stream_converter",
        ("self", "generator"),
    ),
    Contract(
        "entrypoints.anthropic.serving",
        "AnthropicServingMessages.create_messages",
        ("self", "request", "raw_request"),
        calls=("return self.message_stream_converter(generator)",),
    ),
    Contract("entrypoints.anthropic.serving", "_build_anthropic_usage", ("usage",)),
    Contract(
        "entrypoints.anthropic.serving",
        "_to_anthropic_stop_reason",
        ("finish_reason", "stop_reason", "tool_used", "tool_complete"),
    ),
    Contract(
        "entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.chat_completion_stream_generator",
        (
            "self",
            "request",
            "result_generator",
            "request_id",
            "model_name",
            "conversation",
            "tokenizer",
            "request_metadata",
            "chat_template_kwargs",
            "mm_token_counts",
        ),
        calls=(
            "delta_message = DeltaMessage(content=delta_text)",
            "chunk.model_dump_json(exclude_unset=True)",
            "chunk.system_fingerprint = ",
            "chunk.usage = ",
            "final_usage_chunk.model_dump_json(exclude_unset=True, exclude_none=True)",
        ),
    ),
    *_in(
        "entrypoints.openai.chat_completion.serving",
        "_make_prompt_tokens_details",
        "OpenAIServingChat.get_chat_request_role",
    ),
    *_in(
        "entrypoints.generate.base.serving",
        "build_spec_decoding_metrics",
        "GenerateBaseServing._raise_if_error",
        "GenerateBaseServing._convert_generation_error_to_streaming_response",
    ),
    Contract(
        "parser.abstract_parser",
        "DelegatingParser._extract_tool_calls_streaming",
        calls=(
            "if request.tool_choice == 'none':",
            "return (DeltaMessage(content=delta_text) if delta_text else None, False)",
        ),
    ),
    *_in("parser.abstract_parser", "Parser.reasoning_parser_cls", "Parser.tool_parser_cls"),
    Contract("tool_parsers.abstract_tool_parser", "ToolParser.engine_based_streaming"),
    Contract("v1.engine.output_processor", "RequestOutputCollector.aggregate"),
    Contract("outputs", "RequestOutput.add", ("self", "next_output", "aggregate")),
    # Multimodal processors.
    Contract(_PROCESSOR, f"{_BASE}._get_mm_hashes", ("self", "inputs")),
    Contract(_PROCESSOR, f"{_BASE}._apply_hf_processor_main", ("self", "mm_items", "hf_kwargs")),
    Contract(
        _PROCESSOR,
        f"{_BASE}._get_mm_fields_config",
        ("self", "hf_inputs", "hf_processor_mm_kwargs"),
    ),
    Contract(
        _PROCESSOR,
        f"{_BASE}._get_mm_prompt_updates",
        ("self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    ),
    Contract(
        _PROCESSOR,
        f"{_BASE}._recompute_cached_prompt_update",
        ("self", "cached_update", "new_item_idx"),
    ),
    Contract(_PROCESSOR, f"{_BASE}._postprocess_prompt", ("self", "prompt")),
    # What the families of `engine/models/` override.
    Contract(_PROCESSOR, f"{_BASE}._call_hf_processor", ("self", "hf_data", "hf_kwargs")),
    Contract(
        _PROCESSOR,
        f"{_BASE}._get_prompt_updates",
        ("self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    ),
    Contract(_PROCESSOR, f"{_BASE}._maybe_apply_prompt_updates", ("self", "mm_items", "mm_res")),
    Contract(
        _PROCESSOR,
        f"{_BASE}._validate_mm_placeholders",
        calls=("raise RuntimeError(", " prompt placeholders"),
    ),
    Contract(
        "multimodal.processing.context",
        "InputProcessingContext.call_hf_processor",
        calls=("Failed to apply ", "raise ValueError(msg) from exc"),
    ),
    Contract(
        _PROCESSOR,
        f"{_BASE}._matched_updates_from_result",
        calls=("assert update_idx is not None", "Failed to apply prompt"),
    ),
    *_in(
        _PROCESSOR,
        f"{_BASE}._apply_prompt_updates",
        f"{_BASE}._apply_token_matches_with_placeholders",
        f"{_BASE}._validate_mm_kwargs",
        f"{_BASE}._validate_mm_updates",
        "UpdateMode.REPLACE",
        "PlaceholderFeaturesInfo.to_range",
        f"{_BASE}.apply",
        f"{_BASE}._apply_hf_processor",
        f"{_BASE}._cached_apply_hf_processor",
        f"{_BASE}._merge_mm_kwargs",
        "MultiModalProcessingResult.prompt_ids",
        "MultiModalProcessingResult.kwargs",
        "MultiModalProcessingResult.hashes",
        "MultiModalProcessingResult.prompt_updates",
        "ResolvedPromptUpdate",
    ),
    Contract(
        "multimodal.processing.context",
        "BaseProcessingInfo._merge_and_resolve_mm_processor_kwargs",
    ),
    Contract("model_executor.models.qwen2_vl", "Qwen2VLProcessingInfo._get_vision_size"),
    Contract(
        "model_executor.models.llava_onevision",
        "LlavaOnevisionProcessingInfo._get_num_frame_tokens",
    ),
    # Loaders of videos.
    Contract(
        "multimodal.video",
        "VideoBackend.load_bytes",
        ("cls", "data", "num_frames"),
        calls=(
            "decode_video(backend, cls, data, target, sampling_kwargs, backend_kwargs, "
            "frame_recovery=frame_recovery)",
        ),
    ),
    Contract("multimodal.video", "VideoLoader._prepare_source", ("cls", "source")),
    Contract(
        "multimodal.media.video",
        "VideoMediaIO.load_base64",
        ("self", "media_type", "data"),
        (
            "np.asarray(load_frame(frame_data)) for frame_data in frame_parts",
            "'fps': fps, 'duration': duration",
            "'frames_indices': frames_indices",
        ),
    ),
    # Other processes of vLLM.
    Contract(
        "v1.worker.worker_base", "WorkerWrapperBase.execute_model", ("self", "scheduler_output")
    ),
    *_in("v1.worker.worker_base", "WorkerWrapperBase.global_rank", "WorkerWrapperBase.worker"),
    Contract(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner.timed_encoder_operation",
        ("self", "should_time", "group_lora_refs", "current_item_idx", "num_items"),
    ),
    Contract(
        "v1.worker.gpu.mm.encoder_runner",
        "EncoderRunner.timed_encoder_operation",
        ("self", "request_ids"),
    ),
    Contract(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        calls=("return make_empty_encoder_model_runner_output(scheduler_output)",),
    ),
    Contract(
        "v1.worker.ec_connector_model_runner_mixin",
        "ECConnectorModelRunnerMixin._get_ec_connector_output",
        ("scheduler_output", "encoder_cache"),
    ),
    Contract("distributed.device_communicators.shm_broadcast", "sched_yield"),
    Contract(
        "distributed.device_communicators.shm_broadcast",
        "check_shm_free_space",
        ("required_bytes",),
    ),
    # The checks of a request's parameters.
    Contract(
        "v1.engine.async_llm",
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id"),
        calls=("q = await self.add_request(",),
    ),
    Contract(
        "sampling_params",
        "SamplingParams._validate_structured_outputs",
        ("self", "model_config", "structured_outputs_config", "tokenizer"),
    ),
    Contract("v1.engine.output_processor", "RequestOutputCollector.put", ("self", "output")),
    Contract("v1.engine.output_processor", "RequestState.queue"),
    Contract("v1.core.encoder_cache_manager", "EncoderCacheManager.reset", ("self",)),
    # The planner.
    Contract(
        "v1.core.kv_cache_utils",
        "get_kv_cache_configs",
        ("vllm_config", "kv_cache_specs", "available_memory"),
    ),
    Contract(
        "v1.core.kv_cache_utils",
        "get_max_concurrency_for_kv_cache_config",
        ("vllm_config", "kv_cache_config"),
    ),
    Contract(
        "v1.kv_cache_interface", "KVCacheSpec.max_memory_usage_bytes", ("self", "vllm_config")
    ),
    *_in("v1.kv_cache_interface", "KVCacheSpec.page_size_bytes"),
    *_in("config.cache", "CacheConfig.kv_cache_layout"),
    Contract("model_executor.model_loader.utils", "initialize_model", ("vllm_config",)),
    Contract(
        "model_executor.layers.attention_layer_base",
        "AttentionLayerBase.get_kv_cache_spec",
        ("self", "vllm_config"),
    ),
    Contract(
        "distributed.parallel_state",
        "init_distributed_environment",
        ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
    ),
    Contract(
        "distributed.parallel_state",
        "ensure_model_parallel_initialized",
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    ),
]


@dataclass
class Source:
    """The Python files of a vLLM version, below `root` (the folder `vllm`)."""

    root: Path
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def broken(self, contract: Contract) -> str | None:
        """A sentence that describes how `contract` is broken; None if it holds."""
        where = f"vllm.{contract.module}"
        if (tree := self.tree(contract.module)) is None:
            return f"{where} does not exist any more (needed for {contract.name})"
        node: ast.AST = tree
        for part in contract.name.split("."):
            found = self._member(contract.module, node, part)
            if found is None:
                return f"{where} has no {contract.name} any more"
            node = found
        if contract.takes is not None and (why := _differs(node, contract.takes)):
            return f"{contract.id} {why}"
        text = ast.unparse(node) if contract.calls else ""
        for piece in contract.calls:
            if piece not in text:
                return f"{contract.id} does not contain `{piece}` any more"
        return None

    def missing_imports(self) -> Iterator[str]:
        """The names that the server imports from vLLM and that vLLM lacks."""
        for where, module, name in _imports():
            if not self.has(module, name):
                origin = f"vllm.{module}" if module else "vllm"
                yield f"{where} imports {name} from {origin}, which has none any more"

    def has(self, module: str, name: str) -> bool:
        """Whether `name` can be imported from `module`, judged by its source."""
        as_module = f"{module}.{name}" if module else name
        if self.tree(as_module) is not None or (self.root / as_module.replace(".", "/")).is_dir():
            return True
        tree = self.tree(module)
        if tree is None:
            return False
        if self._member(module, tree, name) is not None:
            return True
        # Lazily imported names are strings in the source.
        return any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            base = self.root / module.replace(".", "/") if module else self.root
            files = [base.with_suffix(".py"), base / "__init__.py"]
            path = next((file for file in files if file.is_file()), None)
            self._trees[module] = ast.parse(path.read_text()) if path else None
        return self._trees[module]

    def _member(self, module: str, node: ast.AST, name: str) -> ast.AST | None:
        """The definition of `name` in a module or class, including bases in the same module."""
        for found in _defined(node):
            if found[0] == name:
                return found[1]
        if isinstance(node, ast.ClassDef):
            tree = self.tree(module)
            assert tree is not None
            for base in node.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(base, ast.Name) and base.id != node.name:
                    parent = next((each for n, each in _defined(tree) if n == base.id), None)
                    if isinstance(parent, ast.ClassDef):
                        found_there = self._member(module, parent, name)
                        if found_there is not None:
                            return found_there
        return None


@functools.cache
def _imports() -> list[tuple[Path, str, str]]:
    """What the server imports from vLLM: file, module without `vllm.`, name."""
    found = []
    for path in sorted(SERVER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
                continue
            head, _, module = node.module.partition(".")
            if head == "vllm":
                where = path.relative_to(SERVER.parent)
                found += [(where, module, alias.name) for alias in node.names]
    return found


def _defined(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The definitions in a module or class, by name; for a class also attributes set by methods."""
    for child in _statements(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(ast.unparse(each).endswith("overload") for each in child.decorator_list):
                yield child.name, child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            for alias in child.names:
                yield alias.asname or alias.name, child
        elif isinstance(child, ast.Assign):
            for target in child.targets:
                if isinstance(target, ast.Name):
                    yield target.id, child
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id, child
    if isinstance(node, ast.ClassDef):
        for child in ast.walk(node):
            is_own = isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store)
            if is_own and isinstance(child.value, ast.Name) and child.value.id == "self":
                yield child.attr, child


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, including those in `if` and `try`."""
    for child in getattr(node, "body", []):
        yield child
        if isinstance(child, ast.If | ast.Try):
            yield from _statements(child)
            for other in (*child.orelse, *getattr(child, "handlers", ())):
                yield other
                yield from _statements(other)


def _differs(node: ast.AST, takes: tuple[str, ...]) -> str | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return "is not a function any more"
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    if tuple(names[: len(takes)]) != takes:
        return f"takes ({', '.join(names)}) and no longer ({', '.join(takes)})"
    required = len(names) - len(arguments.defaults)
    if required > len(takes):
        return f"needs {', '.join(names[len(takes) : required])} as well"
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    if needed := [each.arg for each, default in keywords if default is None]:
        return f"needs {', '.join(needed)} as well"
    return None


@functools.cache
def installed() -> Source:
    """The vLLM installed in this environment."""
    # Unlike `find_spec`, this does not run the hook of tests/conftest.py, which imports torch.
    spec = PathFinder.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Source(Path(spec.origin).parent)
