"""What a host's supervisor waits for, as a process that is stopped and goes on; `tests/cluster` has it with workers."""

import os
import signal
import subprocess
import sys
import time

WAITS = """
import signal
from services.worker.agent.supervisor import SIGNALS, next_signal
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
print("waits", flush=True)
print(signal.Signals(next_signal(0.2)).name, flush=True)
"""


def test_a_supervisor_that_was_stopped_for_longer_than_it_waits_sees_only_that_its_time_has_passed() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(0.4)  # for as long it is stopped
        os.kill(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "SIGALRM\n"
    assert process.returncode == 0
