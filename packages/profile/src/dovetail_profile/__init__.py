"""Exact cost counting for JAX programs, matmul rates, and memory."""

from dovetail_profile.counts import Cost, Counts
from dovetail_profile.memory import Memory, ProcessMemory, memory, process_memory
from dovetail_profile.peak import known_peak, measure_matmul_rate, peak_flops
from dovetail_profile.walk import CostError, cost

__all__ = [
    "Cost",
    "CostError",
    "Counts",
    "Memory",
    "ProcessMemory",
    "cost",
    "known_peak",
    "measure_matmul_rate",
    "memory",
    "peak_flops",
    "process_memory",
]
