"""A KD method and a sampler for o2mkd-bench. This module only declares them, so it must not import torch."""

from __future__ import annotations

from o2mkd_bench import hookimpl

from .options import HuberOptions

api = 1


@hookimpl
def register_kd_methods(register):
    register(
        "huber",
        "o2mkd_bench_example.huber:Huber",
        options=HuberOptions,
        version="1",
        paper="arXiv 1701.03077",
        summary="match the teacher's prediction under a pseudo-Huber loss",
    )


@hookimpl
def register_samplers(register):
    register(
        "heun",
        "o2mkd_bench_example.heun:Heun",
        version="1",
        paper="arXiv 2206.00364",
        summary="Heun's method of order 2, two evaluations a step",
    )
