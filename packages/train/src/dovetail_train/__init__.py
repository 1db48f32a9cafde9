"""A jitted, donated training step and a small trainer around it."""
