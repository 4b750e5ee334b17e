"""What the tests of this folder share: they run only under `python -m tests.docker`, which starts the engine."""

import os
from pathlib import Path

import pytest

ENGINE = os.environ.get("GHOST_TEST_DOCKER", "")
IMAGE = os.environ.get("GHOST_TEST_IMAGE", "")

collect_ignore_glob = [] if ENGINE else ["test_*.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Llama named tiny, which the containers' user can read."""
    from tests.tiny_tokenizer import make_tokenizer_dir
    from tests.worker.rank_threads import small_model

    folder = tmp_path_factory.mktemp("models")
    make_tokenizer_dir(small_model(folder / "tiny", "Llama", vocab_size=400, max_position_embeddings=4096))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
