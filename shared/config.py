"""Settings of every service: environment variables GHOST_*, overridden by flags. One class a service."""

import argparse
import os
import socket
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import PydanticBaseSettingsSource as Source

from shared.errors import ConfigError
from shared.logs import check_levels
from shared.types import Protection

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
LogLevels = Annotated[str, AfterValidator(check_levels)]
DType = Literal["bfloat16", "float32", "float16"]


class _Files(Source):
    """A setting's value from the file that GHOST_<setting>_FILE names, as secrets are handed to containers."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"GHOST_{field_name.upper()}_FILE"
        path = os.environ.get(variable)
        if path is None:
            return None, field_name, False
        try:
            return Path(path).read_text().strip(), field_name, False
        except OSError as error:
            raise ConfigError(f"{variable}: can't read {path}: {error.strerror}") from error

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


_PORTS = ("port", "admin_port")


def _is_link(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("tcp://", "udp://"))


class CommonSettings(BaseSettings):
    """What all services share."""

    model_config = SettingsConfigDict(
        env_prefix="GHOST_", extra="ignore", protected_namespaces=(), validate_default=True
    )

    coordinator_url: str = Field("ws://127.0.0.1:8100", description="where workers, stores and gateways dial")
    token: SecretStr | None = Field(None, description="shared secret of the cluster; needed to bind beyond loopback")
    tls_cert_file: str = Field("", description="certificate (chain) of this service's HTTP port, PEM; empty: no TLS")
    tls_key_file: str = Field("", description="its private key, PEM; empty: in the certificate's file")
    tls_ca_file: str = Field("", description="authorities by whom others are verified, PEM; empty: the system's")
    log_level: LogLevels = Field(
        "info", description="least severe log level shown; also by module: info,services.coordinator=debug"
    )
    log_json: bool = Field(False, description="log JSON objects, one a line")
    allow_faults: bool = Field(False, description="let operators break workers: for drills and demonstrations only")
    dial_deadline_s: Seconds = Field(5.0, description="how long one try to reach the coordinator may take")
    fault_dir: str = Field(
        "", description="private directory through which a drill may break workers and stores; empty: it may not"
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Source, env_settings: Source, *others: Source, **_: Source
    ) -> tuple[Source, ...]:
        """Flags, then the environment, then the files that GHOST_..._FILE name."""
        return init_settings, env_settings, _Files(settings_cls)

    @model_validator(mode="before")
    @classmethod
    def _no_service_links(cls, given: Any) -> Any:
        """Kubernetes sets GHOST_PORT=tcp://... in each container beside a service called ghost: no setting of ours."""
        return {name: value for name, value in given.items() if not (name in _PORTS and _is_link(value))}

    @property
    def secret(self) -> str | None:
        """The token in the clear."""
        return self.token.get_secret_value() if self.token else None


class CoordinatorSettings(CommonSettings):
    """The coordinator: the group's configuration, and limits."""

    host: str = Field("127.0.0.1", description="address to listen on for the control channel")
    port: Port = Field(8100, description="port to listen on; 0 takes a free one")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis for the journal and the stripe index")
    group: str = Field("default", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="name of the group")
    model: str = Field("default", description="directory or hub id of the model that workers load")
    served_name: str = Field("", description="model name in the REST API; empty: the model's own")
    dtype: DType = Field("bfloat16", description="type of weights and KV")
    engine: Literal["embedded", "hosted"] = Field(
        "embedded", description="who schedules: this coordinator, or hosted: an engine that dials it, as vLLM does"
    )
    tp: int = Field(3, ge=1, le=64, description="ranks in the group (k)")
    parity: int = Field(1, ge=1, le=8, description="parity shards a stripe (m): how many ranks may be lost at once")
    protection: Protection = Field("parity", description="parity, replicate (raw copies), or none (recompute)")
    protect_tail: bool = Field(False, description="protect each token's KV at its step, not only full pages")
    restore: Literal["auto", "always"] = Field("auto", description="always, or auto: recompute where that is faster")
    page_tokens: int = Field(16, ge=1, le=1024, description="tokens a page")
    kv_memory_mb: int = Field(384, ge=1, description="KV pool of each rank, MiB")
    max_model_len: int = Field(0, ge=0, description="longest sequence; 0: what model and pool allow")
    max_step_tokens: int = Field(512, ge=1, le=65536, description="tokens a step (chunked prefill)")
    max_step_s: Seconds = Field(
        1.0, description="time that a step may take, as far as shorter chunks of prompts make it shorter"
    )
    max_batch: int = Field(32, ge=1, le=1024, description="sequences a step")
    steps_in_flight: int = Field(
        0, ge=0, le=2, description="steps that ranks have at a time, so as not to wait between; 0: 2 on GPUs, 1 on CPUs"
    )
    logits_mb: int = Field(64, ge=1, description="logits that a rank holds at a time, MiB")
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more are refused with 429")
    communicator: Literal["auto", "shm", "gloo", "nccl"] = Field("auto", description="backend between ranks")
    heartbeat_s: Seconds = Field(0.2, description="interval of the workers' heartbeats")
    heartbeat_timeout_s: Seconds = Field(3.0, description="silence after which a worker is lost")
    step_timeout_s: Seconds = Field(
        60.0, description="time without progress of a step after which its laggards are lost"
    )
    hang_timeout_s: Seconds = Field(
        5.0, description="a rank that beats, but stands still for so long while the others wait for it, is lost"
    )
    replace_stragglers: bool = Field(False, description="move a rank that is far slower than the others to a spare")
    step_tries: int = Field(
        2,
        ge=1,
        le=100,
        description="failures of a step before its requests run apart, and the one that fails alone ends",
    )
    collective_timeout_s: Seconds = Field(60.0, description="bound of every wait inside a collective")
    join_timeout_s: Seconds = Field(60.0, description="time for a rank to load its slice and join, before it is lost")
    record_dir: str = Field(
        "",
        description="folder where events are recorded for `ghostserve replay FILE`, prompts among them; empty: nowhere",
    )
    record_mb: int = Field(256, ge=1, description="size of that folder's recordings, MiB; the oldest parts go first")


class WorkerSettings(CommonSettings):
    """A host's workers: a supervisor and `count` processes, one a device."""

    name: str = Field("", description="prefix of the workers' names; empty: the host's name, and a random part")
    count: int = Field(1, ge=1, le=64, description="worker processes on this host")
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda (worker i takes cuda:i), or cuda:N"
    )
    model: str = Field(
        "", description="overrides the model that the coordinator names, where it lies elsewhere on this host"
    )
    advertise_host: str = Field(
        "", description="address by which other ranks reach this host; empty: the one that reaches the coordinator"
    )
    threads: int = Field(1, ge=0, description="compute threads of a CPU worker; 0: cores / workers, at least 1")
    transport: Literal["auto", "tcp", "ucx"] = Field("auto", description="bulk transport; auto: ucx with RDMA")
    hold_weights: bool = Field(
        True, description="a host holds ranks' slices ready, one copy for all its workers: a whole model with a spare"
    )
    stop_grace_s: float = Field(
        0.5, ge=0, description="a worker that stays stopped (SIGSTOP) for so long is killed; 0: it may stay"
    )
    put_deadline_s: Seconds = Field(10.0, description="time for a store to acknowledge a parity shard")
    fetch_deadline_s: Seconds = Field(
        2.0, description="time for a store to return parity, and a second more for each 50 MB; then it is recomputed"
    )
    alive_dir: str = Field("", description="folder where each worker touches a file every second; empty: none")


class ParityStoreSettings(CommonSettings):
    """A parity store."""

    name: str = Field("", description="the store's id; empty: host name and port")
    host: str = Field("127.0.0.1", description="address to listen on for bulk transport and admin")
    port: Port = Field(0, description="bulk port; 0 takes a free one")
    admin_port: Port = Field(0, description="admin port; 0 takes a free one")
    advertise_host: str = Field(
        "", description="address by which workers reach this host; empty: the one that reaches the coordinator"
    )
    transport: Literal["auto", "tcp", "ucx"] = Field("auto", description="bulk transport; auto: ucx with RDMA")
    capacity_mb: int = Field(1024, ge=1, description="memory for parity, MiB")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis of the stripe index")


class GatewaySettings(CommonSettings):
    """A gateway."""

    host: str = Field("127.0.0.1", description="address to listen on for the REST API")
    port: Port = Field(8000, description="port to listen on; 0 takes a free one")
    api_keys: SecretStr | None = Field(
        None, description="API keys that clients may use, comma-separated; needed to bind beyond loopback"
    )
    operator_token: SecretStr | None = Field(
        None, description="token of operators, who see the cluster and move ranks; with API keys, nobody may without it"
    )
    cors_origins: str = Field(
        "",
        description="origins whose pages may call the API, comma-separated, or *; empty: no other's",
    )
    model: str = Field("", description="directory or hub id of the tokenizer; empty: what the coordinator says")
    max_body_mb: float = Field(8.0, gt=0, description="largest request body, MiB")
    max_connections: int = Field(2048, ge=1, description="requests in work at a time; more are refused with 503")
    log_prompts: bool = Field(False, description="log what is asked; without it no text of a request is logged")
    reconnect_s: Seconds = Field(30.0, description="time that streams wait for a coordinator that is away")
    drain_s: float = Field(
        3.0, ge=0, description="time that requests in work get to end after SIGTERM, while no new ones are taken"
    )
    stream_buffer_tokens: int = Field(65536, ge=1, description="tokens held for a client that reads too slowly")


Settings = TypeVar("Settings", bound=CommonSettings)


def add_flags(
    parser: argparse.ArgumentParser, settings: type[CommonSettings], *, skip: Sequence[str] = (), prefix: str = "--"
) -> None:
    """Add a flag --like-this for each field of `settings`."""
    for name, field in settings.model_fields.items():
        if name in skip:
            continue
        default = "" if field.default in (None, "") else f" [{field.default}]"
        parser.add_argument(
            prefix + name.replace("_", "-"),
            dest=name,
            metavar=_metavar(field.annotation),
            **_OPTIONAL_VALUE if field.annotation is bool else {},
            default=None,
            help=f"{field.description}{default} (GHOST_{name.upper()})",
        )


_OPTIONAL_VALUE: dict[str, Any] = {"nargs": "?", "const": "true"}
"""What makes --flag alone mean --flag true."""


def _metavar(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return {int: "N", float: "X", bool: "true|false"}.get(annotation, "TEXT")


def load_settings(settings: type[Settings], arguments: argparse.Namespace, *, prefix: str = "--") -> Settings:
    """Settings from environment and parsed flags. Prints one line for each bad value and exits 2."""
    given = {name: value for name in settings.model_fields if (value := getattr(arguments, name, None)) is not None}
    try:
        return settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0])
            flag, variable = prefix + name.replace("_", "-"), f"GHOST_{name.upper()}"
            shown = "(hidden)" if name in ("token", "api_keys", "operator_token") else repr(problem["input"])
            print(f"ghostserve: {flag} / {variable}: {problem['msg']}; got {shown}", file=sys.stderr)
        raise SystemExit(2) from None


def default_name(kind: str) -> str:
    """A name for a process that was given none."""
    return f"{socket.gethostname()}-{kind}"
