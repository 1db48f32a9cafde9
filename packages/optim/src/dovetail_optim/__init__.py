"""What optax lacks: schedules and parameter groups by path."""
