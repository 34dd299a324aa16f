"""What is run beside training: `pixel-jax NAME`, installed as pixel_jax.tools."""
