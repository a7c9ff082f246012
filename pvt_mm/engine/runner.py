"""One way from a config to a Runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import LoggerHook

#: Log lines that a run should have at least.
LINES = 10


def fit_log_interval(runner: Any, iterations: int) -> None:
    """Have a short run log about ten times, where the config's interval would hide it.

    Args:
        runner: A Runner of mmengine.
        iterations: Of the whole run.
    """
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.interval = min(hook.interval, max(iterations // LINES, 1))
