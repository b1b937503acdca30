"""Makes pytest-benchmark honest about a GPU: cold L2, synchronised rounds, roofline in the JSON."""

import pytest
import torch


@pytest.fixture
def bench(benchmark):
    """``bench(fn, *args, moved=bytes)`` times one call a round; ``--benchmark-json`` keeps device and GB/s.

    ``moved`` is what *must* cross the memory bus, ``flops`` what must be computed; the inputs are evicted from the
    cache before each round, as the stream never finds them warm.
    """

    def run(fn, *args, moved: int, flops: int = 0, rounds: int = 50, **kwargs):
        on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in (*args, *kwargs.values()))
        flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")

        def setup():
            flush.zero_()
            if on_gpu:
                torch.cuda.synchronize()

        def once():
            out = fn(*args, **kwargs)
            if on_gpu:
                torch.cuda.synchronize()
            return out

        benchmark.pedantic(once, setup=setup, rounds=rounds, warmup_rounds=5, iterations=1)
        device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
        benchmark.extra_info.update(device=device, torch=torch.__version__)
        if benchmark.stats:  # absent under --benchmark-disable, which CI uses as a smoke test
            seconds = benchmark.stats["median"]
            benchmark.extra_info["GB/s"] = moved / seconds / 1e9
            benchmark.extra_info["TFLOP/s"] = flops / seconds / 1e12

    return run
