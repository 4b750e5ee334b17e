"""What a test can order from tests.vllm.faults, which imports vLLM. This does not."""

FOLDER = "GHOST_TEST_FAULTS"
"""The environment variable with the folder of the orders: "hang-RANK"; and "forget", "hold" and "slow",
which stay."""
SLOW_S = 0.3
"""What a step of more than one token takes longer with "slow"."""
ON_ALL, ON_ONE, CRASH, ONCE = 571, 572, 573, 574
"""Tokens. Steps with a request whose prompt has one: raise on all ranks; run out of memory on rank 1; end rank 2's
process; raise on all ranks, the first time that a process sees one."""
