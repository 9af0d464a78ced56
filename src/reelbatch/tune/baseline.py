"""Baseline: what does not depend on the batch. FLOPs, matrix rate, decoding, text, and the memory held before a run."""

from __future__ import annotations

from reelbatch.device import free_memory
from reelbatch.memory.streaming import network_bytes
from reelbatch.tune.bench import Bench
from reelbatch.tune.gauges import counting, matrix_rate
from reelbatch.tune.workload import shape_of, shortened


def prepare(bench: Bench) -> None:
    """Warms up with a video alone of each shape, and measures."""
    model, workload, measured = bench.model, bench.workload, bench.measured
    bench.say("warming up: a video alone")
    shapes = {shape_of(request): request for request in workload.requests}
    transformers = [part for name, part in model.family.parts.items() if model.family.phases[name] == "step"]
    for shape, request in shapes.items():
        with counting(transformers) as flops:
            bench.observe([request], only_steps=1)
            measured.flops[shape] = flops()
    measured.matrix_flops = matrix_rate(model.device, model.family.dtype)
    for request in shapes.values():  # a repeat of a few steps need not come to its decodes
        bench.observe([shortened(request, 1)])
    free_memory(whole=True)
    measured.held = bench.gauge.used()
    if bench.memory_limit is None:
        bench.memory_limit = bench.gauge.limit()
    if model.offload == "none":
        measured.weights = sum(map(network_bytes, model.family.parts.values()))
    longest = max(workload.requests, key=lambda request: len(request.prompt))
    weighed = [bench.observe([longest], only_steps=1, weigh=True)]
    weighed += [bench.observe([shortened(request, 1)], weigh=True) for request in shapes.values()]
    measured.text_bytes = max(trace.peaks["text"] for trace in weighed)
    measured.decode_bytes = max(trace.peaks["decode"] for trace in weighed)
