"""The settings. Each is declared once; its flag, variable and help text are derived from that.

A setting `fetch_timeout_s` is the flag `--fetch-timeout-s` and the environment variable
`SACCADE_FETCH_TIMEOUT_S`. Flags override variables, variables override defaults. An unknown
variable with the prefix stops the start: otherwise, a misspelt limit would silently not apply.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from server.concurrency import usable_cores
from server.replica import MOST as MOST_REPLICAS

PREFIX = "SACCADE_"

MIB = 1 << 20
GIB = 1 << 30


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageSettings(_Group):
    """Decoding and preprocessing."""

    image_workers: int = Field(
        default_factory=usable_cores,
        ge=1,
        le=1024,
        description="Image worker processes (default: the cores that the server may use, by "
        "affinity and CPU quota).",
    )
    image_decode: Literal["fast", "exact"] = Field(
        "fast",
        description="fast: decode JPEG at reduced scale where the model's processor shrinks the "
        "picture anyway. exact: decode in full; features equal plain vLLM's bit for bit.",
    )
    worker_sandbox: Literal["auto", "require", "off"] = Field(
        "auto",
        description="auto: processes that decode images, PDFs and clips have neither network nor "
        "files, as far as the kernel can forbid them. require: do not start if it cannot. off: "
        "do not confine them.",
    )
    image_worker_memory_mb: int = Field(
        4096, ge=256, description="Most memory that an image worker may allocate, in MiB."
    )
    image_queue: int = Field(
        1024, ge=1, description="Images that may wait for a worker before requests get a 503."
    )
    image_timeout_s: float = Field(
        30.0, gt=0, description="Longest time that one image may take in a worker, in seconds."
    )
    max_image_bytes: int = Field(
        50 * MIB, ge=1, description="Largest encoded image or file, in bytes."
    )
    max_image_pixels: int = Field(
        100_000_000, ge=1, description="Most pixels of an image, by the size in its header."
    )
    max_decode_pixels: int | None = Field(
        None,
        ge=1,
        description="Most pixels of all images that are in a worker at the same time, by the sizes "
        "in their headers; others wait (default: a quarter of the memory, at 10 bytes a pixel); "
        "one image always fits.",
    )
    max_image_side: int = Field(
        32_768, ge=1, description="Longest side of an image in pixels, by the size in its header."
    )
    max_image_aspect_ratio: float = Field(
        200.0, ge=1, description="Largest ratio of an image's longer side to its shorter side."
    )
    max_request_images: int = Field(
        128, ge=1, description="Most images in one request, counting frames and pages."
    )
    max_image_frames: int = Field(
        32, ge=1, description="Most frames of one animation that a request may select."
    )
    pdf_max_pages: int = Field(32, ge=1, description="Most pages of one PDF in a request.")
    pdf_max_text_chars: int = Field(
        8192, ge=1, description="Most characters of the text of one PDF page (include_text)."
    )
    pdf_dpi: float = Field(
        144.0, gt=0, le=1200, description="Resolution of PDF pages, unless a token cap lowers it."
    )
    pdf_page_timeout_s: float = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="Most processor time that one page of a PDF may take, in seconds.",
    )
    max_image_tokens: int | None = Field(
        None, ge=1, description="Most tokens that one image may take; requests can lower it."
    )
    auto_detail: Literal["whole", "trim", "salient"] = Field(
        "whole",
        description="How images with detail auto, or none, are shown. trim: without margins. "
        "salient: a small view of the whole, and crops where there is detail.",
    )


class VideoSettings(_Group):
    """Videos and audio."""

    max_video_bytes: int = Field(
        256 * MIB, ge=1, description="Largest encoded video or audio clip, in bytes."
    )
    max_video_pixels: int = Field(
        8192 * 4320,
        ge=1,
        description="Most pixels of a frame of a video, by the size in its header.",
    )
    max_video_seconds: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest video, by its header, in seconds.",
    )
    max_video_frames: int = Field(
        216_000,
        ge=1,
        le=1 << 20,
        description="Most frames of a video, by its header; few of them are decoded.",
    )
    max_video_frames_shown: int = Field(
        2048,
        ge=1,
        le=1 << 16,
        description="Most frames of a video that the model gets, and most pictures of one that is "
        "sent as pictures.",
    )
    max_video_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of one video; its frames are shown smaller, and then fewer of "
        "them, to fit.",
    )
    video_workers: int = Field(
        default_factory=usable_cores,
        ge=1,
        le=1024,
        description="Videos and audio clips that are decoded at the same time, each in a process.",
    )
    video_queue: int = Field(
        256, ge=1, description="Videos and audio clips that may wait before requests get a 503."
    )
    video_timeout_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest time that decoding one video or audio clip may take, in seconds.",
    )
    video_max_memory_mb: int = Field(
        4096,
        ge=64,
        description="Most memory that decoding one video or audio clip may take, including its "
        "frames, in MiB.",
    )


class ConstraintSettings(_Group):
    """Structured output."""

    constraint_max_bytes: int = Field(
        64 * 1024,
        ge=1,
        description="Largest JSON schema, grammar, regular expression or list of choices, in "
        "bytes.",
    )
    constraint_max_entries: int = Field(
        4096,
        ge=1,
        description="Most entries of a JSON schema (each property has several) or of a list of "
        "choices.",
    )
    constraint_max_depth: int = Field(
        64, ge=1, description="Deepest nesting of a JSON schema, a grammar or a regular expression."
    )
    constraint_max_repeats: int = Field(
        8192,
        ge=0,
        description="Largest sum of the repetition counts in a constraint, such as {0,100} or "
        "maxLength; each adds 256 at most.",
    )


class HttpSettings(_Group):
    """Requests, fetches and shutdown."""

    @field_validator("allowed_private_media", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(item.strip() for item in value.split(",") if item.strip())

    max_request_bytes: int = Field(256 * MIB, ge=1, description="Largest request body, in bytes.")
    max_request_json_bytes: int = Field(
        8 * MIB,
        ge=1,
        description="Largest request body without its images and files, in bytes.",
    )
    max_request_items: int = Field(
        2048,
        ge=1,
        description="Most messages, content parts, tools, prompts and other items of one request "
        "together; token ids do not count.",
    )
    max_request_values: int = Field(
        300_000,
        ge=100,
        description="Most JSON values in a request body, including token ids; an object, an array, "
        "a string or a name counts as four.",
    )
    max_request_depth: int = Field(
        128, ge=16, description="Deepest nesting of objects and arrays in a request body."
    )
    retained_media_gb: float = Field(
        1.0,
        ge=0,
        description="Memory for the images of stored responses, in GiB; used with "
        "VLLM_ENABLE_RESPONSES_API_STORE.",
    )
    request_read_timeout_s: float = Field(
        60.0, gt=0, description="Longest pause while a request body is received, in seconds."
    )
    request_min_bytes_per_s: int = Field(
        8192,
        ge=0,
        description="Least rate at which a request body must arrive, after 30 seconds, in bytes "
        "per second.",
    )
    request_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Memory for the bodies of all requests in progress, in GiB (default: an eighth "
        "of the memory); at least one body of the largest size always fits.",
    )
    request_memory_wait_s: float = Field(
        5.0,
        ge=0,
        allow_inf_nan=False,
        description="A body waits for this memory without being read. If it would wait longer than "
        "this, by the measured rate, its request gets a 503 at once; and if it has waited 12 times "
        "as long all the same. In seconds.",
    )
    fetch_timeout_s: float = Field(
        10.0, gt=0, description="Deadline for fetching one http(s) image, in seconds."
    )
    fetch_max_redirects: int = Field(3, ge=0, description="Most redirects that one fetch follows.")
    fetch_connections: int = Field(100, ge=1, description="Most fetches at the same time.")
    fetch_connections_per_host: int = Field(
        16,
        ge=1,
        description="Most fetches from one host at the same time; others wait within their "
        "deadline.",
    )
    fetch_cache_gb: float = Field(
        0.25,
        ge=0,
        allow_inf_nan=False,
        description="Memory for fetched images that HTTP caching permits keeping, in GiB; 0: none.",
    )
    allow_private_media: bool = Field(
        False, description="Also fetch images from private, loopback and other internal addresses."
    )
    allowed_private_media: tuple[str, ...] = Field(
        (),
        description="Hosts (img.example.com, *.example.com) and networks (10.1.0.0/16) with "
        "private addresses that images may be fetched from; separated by commas.",
    )
    engine_stall_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Longest time without a sign of life from the engine, in seconds; then "
        "`/health` and `/ready` return a 503, and so do running and new requests; with "
        "`--restart-engine`, it is killed and started again. Longer than any step of the engine. "
        "One of several front ends that is silent for so long is killed and started again.",
    )
    restart_engine: bool = Field(
        False,
        description="Start the engine again in the same server when it has died or hangs, instead "
        "of ending the server: running requests get a 503, and embeddings in host memory stay.",
    )
    max_engine_restarts: int = Field(
        3,
        ge=1,
        description="How often `--restart-engine` starts the engine within "
        "`--engine-restart-window-s`; when it dies once more, the server ends.",
    )
    engine_restart_window_s: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="The time for which `--max-engine-restarts` counts, in seconds.",
    )
    drain_delay_s: float = Field(
        5.0,
        ge=0,
        allow_inf_nan=False,
        description="Time from SIGTERM until the port closes, in seconds. During it, `/ready` is a "
        "503, requests are served, and each answer closes its connection, so that load balancers "
        "move to other servers.",
    )
    drain_timeout_s: int = Field(
        30,
        ge=0,
        description="Time for running requests to finish after the port has closed, in seconds.",
    )


class ConnectionSettings(_Group):
    """Connections. These limits apply before an API key is checked."""

    max_connections: int | None = Field(
        None,
        ge=1,
        description="Most client connections (default: half of the limit on open files, but at "
        "most one for each 5 MiB of memory); further ones get a 503.",
    )
    max_url_bytes: int = Field(8 * 1024, ge=64, description="Longest URL of a request, in bytes.")
    max_header_bytes: int = Field(
        64 * 1024, ge=1024, description="Most bytes of all headers of a request together."
    )
    max_header_fields: int = Field(128, ge=8, description="Most headers of a request.")
    header_timeout_s: float = Field(
        20.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest time from the start of a connection or a request to the end of the "
        "request's headers, in seconds.",
    )
    send_timeout_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest time in which a client may receive nothing of an answer that it could "
        "receive, in seconds.",
    )


class AdmissionSettings(_Group):
    """Admission: how many requests work and wait."""

    max_running_requests: int | None = Field(
        None,
        ge=1,
        description="Requests that are fetched, decoded and answered at the same time (default: a "
        "quarter more than `--max-num-seqs`, and four for each image worker).",
    )
    max_waiting_requests: int = Field(
        4096,
        ge=1,
        description="Requests that may wait for their turn before further ones get a 503.",
    )
    max_wait_s: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="A request that would wait longer for its turn, by the measured rate, gets a "
        "503 at once, in seconds.",
    )
    max_group_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Most of the requests that run at the same time, and of those in the engine, "
        "that may be of one group of API keys while another group has had a request in the last "
        "10 s, as a share; 1: no limit. Groups that wait at the same time divide all. Of the image "
        "workers, half or this share.",
    )
    media_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Memory for the images and clips of running requests, in GiB: their files, and "
        "the features of images until the model has read them (default: an eighth of the memory). "
        "One request may exceed it.",
    )
    max_running_image_tokens: int | None = Field(
        None,
        ge=1,
        description="Most image tokens of running requests together (default: eight times the "
        "tokens that fit into the KV cache). One request may exceed it.",
    )
    request_timeout_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest time from the start of a request to the end of its answer, in "
        "seconds; a client may ask for less with the header `X-Request-Timeout`.",
    )


class AccessSettings(_Group):
    """API keys."""

    api_keys_file: Path | None = Field(
        None,
        description="JSON file of API keys and their groups; caches are shared only inside a "
        "group. The file is read again when it changes.",
    )
    keys_for_all_routes: bool = Field(
        False,
        description="Require an API key for every route except /health, /ready and /ping: also for "
        "/metrics, /docs, /version, and those of vLLM that --api-key leaves open.",
    )
    admin_key: SecretStr | None = Field(
        None, description="API key for all routes, including those that change the server."
    )


class CacheSettings(_Group):
    """Embedding cache: output of the vision encoder, kept beyond the GPU."""

    embedding_cache_gb: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Host memory for image embeddings, in GiB (default: an eighth of the memory, "
        "at most 32); 0: none.",
    )
    embedding_cache_dir: Path | None = Field(
        None, description="Folder on a local disk for image embeddings; they survive a restart."
    )
    embedding_cache_disk_gb: float = Field(
        50.0, gt=0, allow_inf_nan=False, description="Disk space for image embeddings, in GiB."
    )
    embedding_cache_url: SecretStr | None = Field(
        None,
        description="Redis or Valkey in which replicas share image embeddings: "
        "redis://HOST:PORT/DATABASE. Its maxmemory limits their size.",
    )
    embedding_cache_wait_s: float = Field(
        0.04,
        ge=0,
        allow_inf_nan=False,
        description="Longest time that a request waits for embeddings from disk or the shared "
        "store before its images are encoded again, in seconds.",
    )
    encode_only: bool = Field(
        False,
        description="Run the vision encoder without the language model, to fill the lower tiers of "
        "the embedding cache for other servers. Answers have no text.",
    )
    encoder_cache_tokens: int | None = Field(
        None,
        ge=1,
        description="Image tokens that the encoder cache on the GPU holds (default: what fits in "
        "2 % of its memory, at most 65536; on a CPU, the tokens of one step).",
    )


class FileSettings(_Group):
    """Uploaded files."""

    files: bool = Field(True, description="Offer the Files API and batches.")
    files_dir: Path | None = Field(
        None,
        description="Folder on a local disk for uploaded files and batches, used by this server "
        "only (default: saccade/files in the user's cache, which is $XDG_CACHE_HOME or ~/.cache; "
        "if another server uses it or it cannot be written, the Files API is off).",
    )
    files_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Disk space for uploaded files and batches, in GiB (default: 10 with "
        "--files-dir, else 1).",
    )
    files_count: int = Field(100_000, ge=1, description="Most uploaded files.")
    files_group_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Disk space for uploaded files of one key group, in GiB.",
    )
    files_group_count: int | None = Field(
        None, ge=1, description="Most uploaded files of one key group."
    )
    files_ttl_s: int | None = Field(
        None, ge=1, description="Longest lifetime of an uploaded file, in seconds."
    )


class BatchSettings(_Group):
    """Batches."""

    batch_bytes: int = Field(
        200 * MIB, ge=1, description="Largest input file of a batch, in bytes."
    )
    batch_line_bytes: int = Field(
        32 * MIB, ge=1, description="Longest line of an input file, in bytes."
    )
    batch_items: int = Field(50_000, ge=1, description="Most requests of one batch.")
    batch_group_count: int = Field(
        100, ge=1, description="Most unfinished batches of one key group."
    )
    batch_group_items: int = Field(
        500_000, ge=1, description="Most requests in unfinished batches of one key group."
    )


class ObservabilitySettings(_Group):
    """Observability."""

    log_format: Literal["text", "json"] = Field(
        "text",
        description="json: every log line is a JSON object, with one line per request.",
    )
    server_timing: bool = Field(
        True,
        description="Report the stages of a request to its client: in the header `Server-Timing`, "
        "or in a comment at the end of a stream.",
    )


class PageSettings(_Group):
    """Pages in the browser."""

    playground: bool = Field(
        True,
        description="Serve the playground at `/`: a page to ask about pictures, and to watch the "
        "server.",
    )


class ReplicaSettings(_Group):
    """Replicas on this machine, for `saccade serve`."""

    replicas: int = Field(
        1,
        ge=1,
        le=MOST_REPLICAS,
        description="Whole servers behind one address, each on GPUs of its own: pictures go to the "
        "one that has them. Other settings are those of each; defaults that depend on the machine "
        "are divided.",
    )


class DeploySettings(_Group):
    """Replicas on Ray Serve, for `saccade deploy`."""

    front_replicas: int = Field(
        1, ge=1, description="Fronts, or the fewest if there may be more: HTTP and images, on CPUs."
    )
    front_max_replicas: int | None = Field(
        None,
        ge=1,
        description="Most fronts, by requests and images in progress (default: as many).",
    )
    front_cpus: int = Field(
        1,
        ge=1,
        description="CPUs that a front reserves on its node; the default for --image-workers.",
    )
    engine_replicas: int = Field(
        1, ge=1, description="Engines, or the fewest if there may be more."
    )
    engine_max_replicas: int | None = Field(
        None, ge=1, description="Most engines, by the requests in progress (default: as many)."
    )
    engine_cpus: int = Field(1, ge=1, description="CPUs that an engine reserves on its node.")
    engine_surge: int = Field(
        0,
        ge=0,
        description="Engines that an update may start, on GPUs of their own, before it ends as "
        "many; 0: it ends one before it starts the next.",
    )
    scale_up_delay_s: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="How long more replicas must be needed before they are started, in seconds.",
    )
    scale_down_delay_s: float = Field(
        600.0,
        ge=0,
        allow_inf_nan=False,
        description="How long fewer replicas must be needed before some are ended, in seconds.",
    )


class _LeafEnvironment(PydanticBaseSettingsSource):
    """Reads `SACCADE_<SETTING>` for each setting of every group."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # `__call__` reads the whole tree at once

    def __call__(self) -> dict[str, Any]:
        names = {name for _, name, _ in leaves()}
        given = {
            variable.removeprefix(PREFIX).lower(): value
            for variable, value in os.environ.items()
            if variable.startswith(PREFIX)
        }
        if unknown := sorted(given.keys() - names):
            listed = ", ".join(PREFIX + name.upper() for name in unknown)
            raise ValueError(f"unknown environment variable: {listed}")
        return nest(given)


class Settings(BaseSettings):
    """All of Saccade's own settings. The engine is configured by vLLM's flags."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    images: ImageSettings = ImageSettings()
    videos: VideoSettings = VideoSettings()
    http: HttpSettings = HttpSettings()
    constraints: ConstraintSettings = ConstraintSettings()
    connections: ConnectionSettings = ConnectionSettings()
    admission: AdmissionSettings = AdmissionSettings()
    caches: CacheSettings = CacheSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    access: AccessSettings = AccessSettings()
    observability: ObservabilitySettings = ObservabilitySettings()
    pages: PageSettings = PageSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    deploy: DeploySettings = DeploySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _LeafEnvironment(settings_cls)


def leaves() -> Iterator[tuple[str, str, FieldInfo]]:
    """Each setting as (group, name, field), in the order of declaration."""
    for group, group_field in Settings.model_fields.items():
        model = group_field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, field in model.model_fields.items():
            yield group, name, field


def nest(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{setting: value} as the tree {group: {setting: value}} that `Settings` takes."""
    tree: dict[str, dict[str, Any]] = {}
    for group, name, _ in leaves():
        if name in values:
            tree.setdefault(group, {})[name] = values[name]
    return tree


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting to `parser`; `from_flags` validates the values."""
    group = parser.add_argument_group("Saccade", "Saccade's own settings.")
    for _, name, field in leaves():
        unset = field.default_factory or field.default in (None, (), False)
        default = "" if unset else f" (default: {field.default})"
        if field.annotation is bool:
            form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            form = {"metavar": name.rsplit("_", 1)[-1].upper()}
        group.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.description}{default}".replace("%", "%%"),
            **form,
        )


def from_flags(args: argparse.Namespace) -> Settings:
    """Settings from parsed flags and the environment.

    Raises:
        ValueError: a value is invalid, or a variable is unknown; the message names it.
    """
    given = {name: getattr(args, name) for _, name, _ in leaves() if hasattr(args, name)}
    try:
        return Settings(**nest(given))  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [f"{e['loc'][-1]}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise ValueError("; ".join(problems)) from None


def as_markdown() -> str:
    """The content of `docs/settings.md`, with a table of settings for each group."""
    lines = [
        "# Settings",
        "",
        "Saccade's own settings. Each is a flag of `saccade serve` and an environment variable;",
        "flags override variables. An unknown variable `SACCADE_...` stops the start. All other",
        "flags are vLLM's (`saccade serve --help=all` lists them); some of them are",
        "[refused](migration.md#refused-flags), some have",
        "[other defaults](migration.md#other-defaults).",
    ]
    group_before = ""
    for group, name, field in leaves():
        if group != group_before:
            group_before = group
            model: Any = Settings.model_fields[group].annotation
            lines += ["", f"## {model.__doc__.rstrip('.')}", ""]
            lines += ["| Flag | Variable | Default | |", "| --- | --- | --- | --- |"]
        default = "one per core" if field.default_factory else _shown(field.default)
        flag, variable = "--" + name.replace("_", "-"), PREFIX + name.upper()
        lines.append(f"| `{flag}` | `{variable}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    if default is None or default == ():
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    print(as_markdown(), end="")
