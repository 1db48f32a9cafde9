def test_loops_that_state_their_iterations():
    """A loop whose bounds depend on data counts what its scope says, on average, and the scope's name stays out."""
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def loop(x, n):
        with jax.named_scope("layer"), jax.named_scope("trips=2.5"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    found = cost(loop, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert found.matmul_flops == 2.5 * 2 * 4**3
    assert {scope for scope, _ in found.entries} == {"layer"}
