"""The private parts of jax that have no public counterpart: what ``jax.distributed`` was started with."""

from typing import Any

from jax._src import distributed as _distributed  # pyright: ignore[reportPrivateUsage]

__all__ = ["distributed_settings", "has_preemption_service"]


def _state() -> Any:
    return _distributed.global_state


def distributed_settings() -> tuple[str, int, int] | None:
    """Return ``(coordinator, number of processes, process index)``, or None if jax.distributed is not running."""
    state = _state()
    if state.client is None:
        return None
    return state.coordinator_address, state.num_processes, state.process_id


def has_preemption_service() -> bool:
    """Tell whether jax listens for SIGTERM and can agree on a step at which to stop."""
    return _state().preemption_sync_manager is not None
