"""`vllm serve` with our classes: python -m services.vllm.serve MODEL [flags of vllm serve].

What is not protected is refused in one line before a worker is started. The environment names the coordinator
(GHOST_COORDINATOR_URL); without one nothing is protected, and what is lost is recomputed.
"""

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

from services.vllm import flags, versions
from shared.errors import ConfigError, GhostError
from shared.service import exit_code


def run(arguments: Sequence[str]) -> None:
    """Serve until a signal. Raises ConfigError, or ends the process as vLLM ends it."""
    given = _own_environment()
    import vllm
    from vllm.entrypoints.cli.main import main as vllm_main
    from vllm.platforms import current_platform

    if refusal := versions.check(vllm.__version__):
        raise ConfigError(refusal)
    platform = str(current_platform.device_type)
    if platform == "cuda":
        print(f"ghostserve vllm: {flags.GPU_UNTRIED}", file=sys.stderr)
        arguments = [*arguments, *flags.GPU_FLAGS]
        for name, value in flags.GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    config = _configuration(arguments)
    if refusal := flags.refusal(config, platform, os.environ.get("VLLM_KV_CACHE_LAYOUT")):
        raise ConfigError(refusal)
    _set_threads(given, config.parallel_config.tensor_parallel_size)
    asynchronous = bool(config.scheduler_config.async_scheduling)
    sys.argv = ["vllm", "serve", *arguments, *flags.classes(platform, asynchronous=asynchronous)]
    vllm_main()


def _configuration(arguments: Sequence[str]) -> Any:
    """The VllmConfig that `vllm serve` makes of its flags. One that it doesn't know ends the process, in its words."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="ghostserve vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    try:
        parsed = parser.parse_args(["serve", *arguments])
        if parsed.model_tag is not None:
            parsed.model = parsed.model_tag
        command.validate(parsed)
        return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"vLLM refuses this: {' '.join(str(error).split())[:500]}") from error


CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a spare is bound to no rank's cores: it may become any
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Of vLLM's CPU build, where nothing else is set."""


def _own_environment() -> bool:
    """Before vllm is imported. Whether the number of threads is given."""
    given = "OMP_NUM_THREADS" in os.environ
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return given


def _set_threads(given: bool, ranks: int) -> None:
    """The ranks share the cores; workers inherit it."""
    if not given:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))


def main() -> int:
    """Run. Returns the exit code."""
    try:
        run(sys.argv[1:])
    except GhostError as error:
        print(f"ghostserve vllm: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
