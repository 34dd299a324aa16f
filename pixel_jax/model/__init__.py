"""The model: Qwen2.5-VL as pure functions of (config, params, arrays).  Device world.

Read `qwen2_5_vl.py` first.  Modules are Flax NNX and are used functionally: parameters
are a pure nested dict of arrays, stacked over layers, and only this room imports
`flax.nnx`.  No module carries a sharding annotation; those derive from the table of
`hf.py`.

Key of the axis letters, the same in type annotations, einsums and comments:

  B  rows of a batch, or sequences of a cache     V  vocabulary
  T  tokens of a row; queries                     L  layers
  S  keys; slots of the cache                     P  patches of a row
  D  width of the residual stream                 M  merged patches, P / 4
  N  query heads                                  C  numbers of a patch, 3 * 2 * 14 * 14
  K  key-value heads                              R  rows picked out of a cache
  G  query heads of one key-value head, N / K     W  patches of a vision window, 64
  H  numbers of a head                            F  width of the MLP

Attention is heads-first, q[B N T H] and k[B K S H]: the layout of the cache, where a
step of decoding neither copies nor relays it.
"""
