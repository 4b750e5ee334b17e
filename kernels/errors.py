"""The one error of kernels/, which knows nothing of services; the worker translates it to shared.errors.CodecError."""


class CodecError(ValueError):
    """Impossible or malformed input to the erasure code, or no library to run it with."""
