"""`ghostserve`: one entry, one subcommand a service, and those that run or test a whole cluster."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from shared.config import (
    CommonSettings,
    CoordinatorSettings,
    GatewaySettings,
    ParityStoreSettings,
    WorkerSettings,
    add_flags,
    load_settings,
)
from shared.errors import GhostError
from shared.service import exit_code

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code: 0, 1 after a failure, 2 for a wrong call.

    EXIT_CONFIG where the settings or the model are wrong, so that another start would end the same way.
    """
    parsed = parse(arguments)
    run: Run = parsed.run
    try:
        return run(parsed)
    except GhostError as error:
        print(f"ghostserve: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments' meaning; `rest` is what is passed on to vLLM. Ends the process for a wrong call."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(parsed, "rest"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.rest = rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    from services.cli.local import ServeSettings

    parser = argparse.ArgumentParser(
        prog="ghostserve",
        description="LLM serving that loses no request when a device dies.",
        epilog="Each setting is a flag, or the environment variable named beside it; the flag wins.",
    )
    parser.add_argument("--version", action="version", version=f"ghostserve {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(commands, "serve", "run a whole cluster on this machine until Ctrl-C", ServeSettings, _serve)
    _add(commands, "gateway", "run the REST API", GatewaySettings, _gateway)
    _add(commands, "coordinator", "run the coordinator", CoordinatorSettings, _coordinator)
    _add(commands, "worker", "run this host's workers", WorkerSettings, _worker)
    _add(commands, "parity-store", "run a parity store", ParityStoreSettings, _parity_store)
    vllm = commands.add_parser("vllm", help="run vLLM with its ranks protected, until Ctrl-C").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    from services.cli.vllm import add_arguments as add_vllm_arguments

    vllm_serve = vllm.add_parser("serve", help="run `vllm serve`, and what protects it", allow_abbrev=False)
    add_vllm_arguments(vllm_serve)
    vllm_serve.set_defaults(run=_vllm_serve, rest=[])
    drill = commands.add_parser(
        "drill",
        help="start a cluster, kill workers in mid-stream, and see that no token is lost",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from services.cli.drill import add_arguments

    add_arguments(drill)
    drill.set_defaults(run=_drill)
    model = commands.add_parser("model", help="fetch or convert a model, and print the directory of its files")
    model.add_argument("name", nargs="?", default="default", help="default, a directory, or a hub id")
    model.set_defaults(run=_model)
    from services.cli.doctor import add_arguments as add_doctor_arguments
    from services.cli.move import add_arguments as add_move_arguments
    from services.cli.replay import add_arguments as add_replay_arguments
    from services.cli.status import add_status_arguments, add_top_arguments
    from services.cli.store import add_arguments as add_store_arguments

    doctor = commands.add_parser("doctor", help="say what this machine has, what is picked of it and why")
    add_doctor_arguments(doctor)
    doctor.set_defaults(run=_doctor)
    status = commands.add_parser("status", help="show ranks, spares, stores, protection and the last recoveries")
    add_status_arguments(status)
    status.set_defaults(run=_status)
    top = commands.add_parser("top", help="show rates, latencies and load, live")
    add_top_arguments(top)
    top.set_defaults(run=_top)
    for action, summary in (
        ("drain", "move a rank to a spare while requests go on, and take its worker no more"),
        ("replace", "move a rank to a spare while requests go on"),
        ("resume", "let a drained worker be taken again"),
    ):
        moved = commands.add_parser(action, help=summary)
        add_move_arguments(moved, summary[0].upper() + summary[1:] + ".")
        moved.set_defaults(run=_move, action=action)
    replay = commands.add_parser("replay", help="run a coordinator's recording again, and tell what happened")
    add_replay_arguments(replay)
    replay.set_defaults(run=_replay)
    store = commands.add_parser("store", help="look at a parity store, scrub it, drain it")
    add_store_arguments(store)
    store.set_defaults(run=_store)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    settings: type[CommonSettings],
    run: Run,
) -> None:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    add_flags(command, settings)
    command.set_defaults(run=run)


def _version() -> str:
    try:
        return version("ghostserve")
    except PackageNotFoundError:
        return "unknown"


def _announce(address: str) -> None:
    print(f"listening on {address}", flush=True)


def _serve(arguments: argparse.Namespace) -> int:
    from services.cli.local import ServeSettings
    from services.cli.serve import serve

    return serve(load_settings(ServeSettings, arguments))


def _vllm_serve(arguments: argparse.Namespace) -> int:
    from services.cli.vllm import PREFIX, VllmSettings, serve

    return serve(load_settings(VllmSettings, arguments, prefix=PREFIX), arguments.rest)


def _gateway(arguments: argparse.Namespace) -> int:
    from services.gateway.app import run
    from shared.service import run_service

    settings = load_settings(GatewaySettings, arguments)
    return run_service("gateway", lambda stop: run(settings, stop, _announce), settings, grace_s=settings.drain_s)


def _coordinator(arguments: argparse.Namespace) -> int:
    from services.coordinator.app import run
    from shared.service import run_service

    settings = load_settings(CoordinatorSettings, arguments)
    return run_service("coordinator", lambda stop: run(settings, stop, _announce), settings)


def _worker(arguments: argparse.Namespace) -> int:
    from services.worker.agent.supervisor import supervise

    return supervise(load_settings(WorkerSettings, arguments))


def _parity_store(arguments: argparse.Namespace) -> int:
    from services.parity_store.app import run
    from shared.service import run_service

    settings = load_settings(ParityStoreSettings, arguments)
    return run_service("parity-store", lambda stop: run(settings, stop, _announce), settings)


def _drill(arguments: argparse.Namespace) -> int:
    from services.cli.drill import drill

    return drill(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from services.cli.doctor import doctor

    return doctor(arguments)


def _status(arguments: argparse.Namespace) -> int:
    from services.cli.status import status

    return status(arguments)


def _move(arguments: argparse.Namespace) -> int:
    from services.cli.move import move

    return move(arguments)


def _top(arguments: argparse.Namespace) -> int:
    from services.cli.status import top

    return top(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from services.cli.replay import run

    return run(arguments)


def _store(arguments: argparse.Namespace) -> int:
    from services.cli.store import store

    return store(arguments)


def _model(arguments: argparse.Namespace) -> int:
    from services.cli.serve import fetch_model

    print(fetch_model(arguments.name))
    return 0


def entry() -> NoReturn:
    """The program. It ends without taking apart what it has imported, which is seconds of work for nothing."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)
