"""What the real compilers of TPU and GPU say of a run, asked on a CPU."""
