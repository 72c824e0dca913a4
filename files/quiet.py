"""Opening models' files without what the libraries write between a command's own lines: bars of local loads, advice, notices.

Downloads keep their bar: they take minutes. Libraries are imported when one of their models is opened, and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers and diffusers report errors alone, within the block or the function that it decorates."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    logs = [transformers_logging]
    if "diffusers" in sys.modules:
        from diffusers.utils import logging as diffusers_logging

        logs.append(diffusers_logging)
    before = [log.get_verbosity() for log in logs]
    had_bars, downloads_show = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads_show:
        enable_progress_bars()  # transformers hides those too
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
