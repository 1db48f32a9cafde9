"""Meshes, logical sharding rules, process bootstrap and the preemption flag."""
