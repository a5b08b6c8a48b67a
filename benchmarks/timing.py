"""What the scripts on speed share: interleaved medians and the peak of the memory."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function; they run in turns, so that ratios hold on a busy machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + WARM_UP):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that a function holds at once, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
