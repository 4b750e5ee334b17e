"""A tensor-parallel group of threads in the test's own process, and small random models for it to run."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from services.worker.communicator import create, open_rendezvous
from services.worker.communicator.base import Communicator
from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.model import RankModel
from services.worker.engine.sampler import sample_greedy

SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # far from ties
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def small_model(directory: Path, family: str, **changes: Any) -> Path:
    """Write a small random float32 model of a family ("Llama", "Qwen3", ...) and return its directory."""
    torch.manual_seed(42)
    config = getattr(transformers, family + "Config")(**(SMALL | changes))
    model = getattr(transformers, family + "ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # not the ones and zeros that they begin as
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return directory


class RankThreads:
    """`size` ranks of a model, each with a pool, stepping in threads. All ranks must give the same logits."""

    def __init__(self, model_dir: Path, size: int, *, page_tokens: int = 16, pages: int = 64) -> None:
        self.size = size
        self._threads = ThreadPoolExecutor(size)
        self.page_tokens = page_tokens
        self.models = [RankModel(model_dir, size=size, dtype=torch.float32) for _ in range(size)]
        spec = self.models[0].spec
        self.pools = [
            KVPool(
                pages=pages,
                layers=spec.layers,
                page_tokens=page_tokens,
                kv_heads=spec.kv_heads // size,
                head_dim=spec.head_dim,
                dtype=torch.float32,
            )
            for _ in range(size)
        ]
        for rank, model in enumerate(self.models):
            model.load(rank)
        if size == 1:
            self._communicators = [None]
            return
        handle = open_rendezvous("shm", size)
        connecting = [self._threads.submit(create, "shm", handle.address, r, size, timeout=30) for r in range(size)]
        self._communicators = [future.result() for future in connecting]
        handle.close()

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run a step on every rank: float32 logits [rows, vocab]."""
        running = [
            self._threads.submit(_logits, model, chunks, pool, communicator)
            for model, pool, communicator in zip(self.models, self.pools, self._communicators, strict=True)
        ]
        logits = [future.result(60) for future in running]
        assert all(torch.equal(logits[0], other) for other in logits[1:])
        return logits[0]

    def pieces(self, chunks: Sequence[Chunk], limit: int) -> list[torch.Tensor]:
        """Rank 0's logits of a step in pieces of `limit` bytes; all ranks ask for the same ones."""

        def run(model: RankModel, pool: KVPool, communicator: Communicator | None) -> list[torch.Tensor]:
            return list(model.logits_in_pieces(model.forward(chunks, pool, communicator), limit))

        running = [
            self._threads.submit(run, *each) for each in zip(self.models, self.pools, self._communicators, strict=True)
        ]
        first, *_ = [future.result(60) for future in running]
        return first

    def digests(self, pages: np.ndarray, tokens: int) -> list[str]:
        return [pool.digest(pages, tokens) for pool in self.pools]

    def close(self) -> None:
        for communicator in self._communicators:
            if communicator is not None:
                communicator.close()
        self._threads.shutdown()


def _logits(model: RankModel, chunks: Sequence[Chunk], pool: KVPool, communicator: Communicator | None) -> torch.Tensor:
    return model.logits(model.forward(chunks, pool, communicator))


class Story:
    """One sequence in a test: its tokens so far and its pages."""

    def __init__(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        self.prompt_tokens = len(prompt)
        self.tokens = list(prompt)
        self.pages = np.array(pages, dtype=np.int32)
        self.done = 0  # tokens whose KV is there

    def chunk(self, count: int | None = None) -> Chunk:
        """The next `count` tokens (all, if None) without KV; wants the last one's logits if none are left then."""
        end = len(self.tokens) if count is None else min(len(self.tokens), self.done + count)
        tokens = np.array(self.tokens[self.done : end], dtype=np.int32)
        logits = "last" if end == len(self.tokens) else "none"
        chunk = Chunk(tokens, self.done, self.prompt_tokens, self.pages, logits)  # type: ignore[arg-type]
        self.done = end
        return chunk


def generate(group: RankThreads, sequence: Story, count: int, chunk: int | None = None) -> list[int]:
    """Greedy tokens of one sequence, prefilled in chunks of `chunk`."""
    generated: list[int] = []
    while len(generated) < count:
        logits = group.step([sequence.chunk(chunk)])
        if len(logits):
            generated += sample_greedy(logits)
            sequence.tokens.append(generated[-1])
    return generated
