"""Read slices of a model's weights from its safetensors."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.worker.engine.checkpoint import one_line, weight_files
from shared.errors import ModelError


class Weights:
    """The safetensors of a model, of which slices are read."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._directory = directory
        self._device = device
        self._dtype = dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # tensor name -> open file

    def __enter__(self) -> "Weights":
        for path in weight_files(self._directory):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} can't be read: {one_line(error)}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def read(self, name: str, dimension: int | None = None, rank: int = 0, size: int = 1) -> torch.Tensor:
        """A tensor, or of its `dimension` (0 or 1) the rank's part of `size` equal ones."""
        if dimension is None:
            return self._finish(self._file(name).get_tensor(name))
        content = self._file(name).get_slice(name)
        step = content.get_shape()[dimension] // size
        part = slice(rank * step, (rank + 1) * step)
        return self._finish(content[part] if dimension == 0 else content[:, part])

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor."""
        return self._finish(self._file(name).get_slice(name)[first:last])

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise ModelError(f"{self._directory}: weight {name} is missing")
        return self._files[name]

    def _finish(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)
