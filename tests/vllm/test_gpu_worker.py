"""The worker class for GPUs, as far as a machine without one can show: with vLLM's own objects on a fake device."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.server import ENVIRONMENT
from tests.worker.fake_cuda import FakeCuda, FakeNccl, Wire, World

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 3
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> Any:
    os.environ.update(ENVIRONMENT)
    from vllm.engine.arg_utils import EngineArgs

    given = EngineArgs(str(tiny_llama), dtype="float32", tensor_parallel_size=SIZE, max_model_len=512)
    return given.create_engine_config()


@pytest.fixture
def groups(config: Any) -> Iterator[Any]:
    """Those of rank 0 on a GPU, installed as a worker's are."""
    from vllm.distributed import parallel_state

    from services.vllm.groups import Groups

    names = ("_WORLD", "_NODE_COUNT", "_TP", "_ETP", "_DCP", "_PCP", "_PP", "_DP", "_EP")
    before = {name: getattr(parallel_state, name) for name in names}
    made = Groups.of(config, 0, GPU)
    made.install()
    yield made
    for name, value in before.items():
        setattr(parallel_state, name, value)


def test_the_class_that_is_named_to_vllm_is_a_gpu_worker_whose_steps_are_vllms_own() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    from services.vllm import flags

    kind = resolve_obj_by_qualname(flags.WORKERS["cuda"])
    assert issubclass(kind, Worker)
    assert {"execute_model", "sample_tokens", "initialize_from_config"}.isdisjoint(vars(kind))
    assert kind.leave.__module__ == "services.vllm.gpu_worker"


# -- collectives ---------------------------------------------------------------------------------------------------


def together(part: Callable[[Any], Any]) -> tuple[list[Any], World]:
    """Run on three ranks, each in a thread bound to a device of its own, over NCCL's stand-in."""
    from services.vllm.communicator import RankCommunicator

    world = World()
    wire = Wire(world, SIZE)
    devices = [FakeCuda(world) for _ in range(SIZE)]
    threads = [ThreadPoolExecutor(1, f"rank-{rank}", device.bind) for rank, device in enumerate(devices)]
    channels = [FakeNccl(device, wire, rank) for rank, device in enumerate(devices)]
    ranks = []
    for rank, channel in enumerate(channels):
        made = RankCommunicator("tp:0", list(range(SIZE)), rank, torch.device("cuda", rank))
        made.channel = channel
        ranks.append(made)
    try:
        running = [thread.submit(part, made) for thread, made in zip(threads, ranks, strict=True)]
        return [each.result(20) for each in running], world
    finally:
        for channel in channels:
            channel.close()
        for thread in threads:
            thread.shutdown()


def test_a_layers_sum_leaves_what_was_summed_as_it_is_and_the_host_waits_for_nothing() -> None:
    """torch.ops.vllm.all_reduce is a function to compiled code, which may use its argument again."""

    def part(rank: Any) -> Any:
        given = torch.full((4,), float(rank.rank + 1))
        return given, rank.all_reduce(given)

    came, world = together(part)
    assert [(given.tolist(), out.tolist()) for given, out in came] == [([r + 1.0] * 4, [6.0] * 4) for r in range(SIZE)]
    assert world.counts["collectives"] == SIZE
    assert world.counts["waits"] == 0
    assert not world.hazards()


def test_logits_are_gathered_in_the_ranks_order() -> None:
    came, world = together(lambda rank: rank.all_gather(torch.full((2, 1), float(rank.rank))))
    assert [each.tolist() for each in came] == [[[0.0, 1.0, 2.0]] * 2] * SIZE
    assert not world.hazards()


def test_alone_a_ranks_sums_are_its_own() -> None:
    from services.vllm.communicator import RankCommunicator

    alone, given = RankCommunicator("tp:0", [0, 1], 0, GPU), torch.ones(2)
    summed = alone.all_reduce(given)
    assert summed.tolist() == [1.0, 1.0]
    assert summed is not given


# -- CUDA graphs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(config: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's dispatcher of graphs (model runner V2), with one captured for each batch size."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    compiling = config.compilation_config
    monkeypatch.setattr(compiling, "cudagraph_capture_sizes", [1, 2, 4])
    monkeypatch.setattr(compiling, "max_cudagraph_capture_size", 4)
    manager = CudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=1)
    made = SimpleNamespace(cudagraph_manager=manager, execute_model_state=None, captures=0)

    def capture() -> None:
        made.captures += 1
        assert not manager.graphs  # vLLM's own assertion: a graph is captured once
        manager.graphs.update({desc: object() for descs in manager._capture_descs.values() for desc in descs})
        manager._graphs_captured = True

    made.capture_model = capture
    capture()
    return made


def mode(runner: Any) -> str:
    """How vLLM would run a step that decodes two requests."""
    chosen = runner.cudagraph_manager.dispatch(num_reqs=2, num_tokens=2, uniform_token_count=1, num_active_loras=0)
    return str(chosen.cg_mode.name)


def agreed(yes: bool) -> bool:
    return yes


def test_steps_run_eager_after_a_recovery_until_graphs_are_captured_again(runner: Any) -> None:
    from services.vllm import graphs

    assert mode(runner) == "FULL"
    graphs.release(runner)
    assert mode(runner) == "NONE"
    assert not runner.cudagraph_manager.graphs  # NCCL's abort waits for graphs with its operations
    assert graphs.capture_again(runner, nullcontext(True), agreed, needed=True) is True
    assert mode(runner) == "FULL"
    assert runner.captures == 2


@pytest.mark.parametrize("reason", ["a step is half done", "the shadow is busy", "another rank can't"])
def test_nothing_is_captured_at_a_time_that_is_wrong_for_any_rank(runner: Any, reason: str) -> None:
    from services.vllm import graphs

    graphs.release(runner)
    runner.execute_model_state = object() if reason == "a step is half done" else None
    quiet = nullcontext(reason != "the shadow is busy")

    def agree(yes: bool) -> bool:
        return yes and reason != "another rank can't"

    assert graphs.capture_again(runner, quiet, agree, needed=True) is None
    assert mode(runner) == "NONE"
    assert runner.captures == 1


def test_where_one_rank_fails_to_capture_all_stay_eager(runner: Any) -> None:
    from services.vllm import graphs

    graphs.release(runner)
    answers = iter([True, False])  # all could; another one failed
    assert graphs.capture_again(runner, nullcontext(True), lambda _: next(answers), needed=True) is False
    assert mode(runner) == "NONE"

    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory")

    runner.capture_model = out_of_memory
    assert graphs.capture_again(runner, nullcontext(True), agreed, needed=True) is False
    assert mode(runner) == "NONE"


def test_an_engine_without_graphs_captures_none(runner: Any) -> None:
    from services.vllm import graphs

    graphs.release(runner)
    assert graphs.capture_again(runner, nullcontext(True), agreed, needed=False) is False
    assert runner.captures == 1


def test_graphs_are_released_before_a_rank_has_its_cache() -> None:
    from services.vllm import graphs

    graphs.release(SimpleNamespace(cudagraph_manager=None))


# -- a rank that comes and goes ------------------------------------------------------------------------------------


def test_a_rank_that_leaves_forgets_its_requests_its_peers_and_its_graphs(runner: Any, groups: Any) -> None:
    from services.vllm.gpu_worker import GhostGpuWorker

    worker = GhostGpuWorker.__new__(GhostGpuWorker)
    runner.req_states = SimpleNamespace(req_id_to_index={"a": 0, "b": 1})
    runner._remove_request = runner.req_states.req_id_to_index.pop
    runner.execute_model_state = object()
    worker.model_runner, worker.groups, worker.model_config = runner, groups, SimpleNamespace(seed=0)
    channel: Any = object()
    worker.rejoin(1, channel)
    assert groups.tp.device_communicator.channel is channel
    worker.leave()
    assert not runner.req_states.req_id_to_index
    assert runner.execute_model_state is None
    assert groups.tp.device_communicator.channel is None
    assert mode(runner) == "NONE"
    worker.rejoin(2, channel)
    assert mode(runner) == "NONE"


def test_one_that_comes_later_neither_measures_memory_nor_captures(
    monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from services.vllm.gpu_worker import GhostGpuWorker

    def asked(self: Any) -> bool:
        return bool(self.model_config.enforce_eager)

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", asked)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 17)
    worker: Any = GhostGpuWorker.__new__(GhostGpuWorker)
    profiled = []
    worker.vllm_config, worker.model_config = config, SimpleNamespace(enforce_eager=False, multimodal_config=None)
    worker.model_runner = SimpleNamespace(profile_run=lambda randomize_inputs: profiled.append(randomize_inputs))
    monkeypatch.setattr(GhostGpuWorker, "randomize_dummy_inputs", False)
    assert worker.determine_available_memory() == 0
    assert len(profiled) == 1
    assert worker.compile_or_warm_up_model() is True  # as with --enforce-eager
    worker.joined = True
    assert worker.determine_available_memory() == 17
    assert worker.compile_or_warm_up_model() is False
    assert worker.model_config.enforce_eager is False


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_names_the_gpu_class_on_cuda_and_says_that_it_has_not_run_on_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import vllm.entrypoints.cli.main
    import vllm.platforms

    from services.vllm import flags, serve
    from tests.pure.test_vllm_flags import config

    served: list[list[str]] = []
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(vllm.entrypoints.cli.main, "main", lambda: served.append(sys.argv))
    for name in flags.GPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [])
    given = config(scheduler_config=SimpleNamespace(async_scheduling=True))
    monkeypatch.setattr(serve, "_configuration", lambda arguments: given)
    serve.run(["MODEL", "-tp", "4"])
    (argv,) = served
    assert argv[argv.index("--worker-cls") + 1] == flags.WORKERS["cuda"]
    assert argv[argv.index("--scheduler-cls") + 1] == flags.ASYNC_SCHEDULER
    assert set(flags.GPU_FLAGS) <= set(argv)
    assert os.environ["VLLM_KV_CACHE_LAYOUT"] in flags.BLOCKS_OUTERMOST
    (said,) = capsys.readouterr().err.splitlines()
    assert "not served on a GPU" in said
