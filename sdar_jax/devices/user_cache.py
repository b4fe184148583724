"""Where what was found out once is kept for a user: compiled programs, verdicts on kernels."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Returns the folder, which need not exist: SDAR_JAX_CACHE_DIR, else sdar_jax in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SDAR_JAX_CACHE_DIR"):
        return Path(own).expanduser()
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sdar_jax"
