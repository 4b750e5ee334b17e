"""Which releases of vLLM this was tried with: we use what is private to them."""

import os

TRIED = ("0.32.0",)


def check(version: str) -> str:
    """Empty, or in one line why this version of vLLM is refused. docs/vllm.md says how to try and add one."""
    release = version.partition("+")[0]
    if release in TRIED or os.environ.get("GHOST_VLLM_ANY_VERSION", "").lower() in ("1", "true", "yes"):
        return ""
    tried = ", ".join(TRIED)
    return f"vLLM {version} was not tried, only {tried}; set GHOST_VLLM_ANY_VERSION=1 to use it all the same"
