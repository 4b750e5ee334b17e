"""What a worker that has only warmed up tells of requests when it takes a rank: nothing."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_spare_that_has_warmed_up_knows_no_state_of_a_seeded_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.cpu_worker import CPUWorker

    from services.vllm import batch, warm
    from services.vllm.worker import GhostCpuWorker

    monkeypatch.setattr(CPUWorker, "execute_model", lambda self, output: None)
    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", lambda self: None)
    monkeypatch.setattr(warm, "run_steps", lambda worker: worker.execute_model(SchedulerOutput.make_empty()))
    monkeypatch.setattr(batch, "wipe", lambda runner: None)
    worker = GhostCpuWorker.__new__(GhostCpuWorker)
    worker._draws = {}
    worker.model_runner = SimpleNamespace(kv_caches=[], requests={})
    worker.model_config = SimpleNamespace(seed=0)
    worker.groups = SimpleNamespace(connect=lambda channel: None)
    worker.compile_or_warm_up_model()
    assert worker.rejoin(2, None) == {-1: {}}  # what decides takes the first that tells of more than the present
