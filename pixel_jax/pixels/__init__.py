"""Pictures on the host: numpy, PIL and (only while a clip is read) decord.

  image.py     load, smart_resize, resize, patchify, normalize
  video.py     a clip -> frames chosen by time
  geometry.py  a grid -> window order, rotary and M-RoPE ids; `Pixels`, for the device
  ops.py       crop_image_normalized, select_frames: (seen, arguments) -> pictures

Everything is pixel-exact to `transformers`' Qwen2VLImageProcessorPil.  Nothing here
imports jax or torch, and importing this package imports none of its files.
"""
