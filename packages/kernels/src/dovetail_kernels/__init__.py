"""Operations for models in JAX: attention, fused losses, norms, rotary embeddings."""
