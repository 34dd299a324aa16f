"""Pictures on the host: numpy, PIL, and a reader of clips (decord or PyAV).

  image.py     load, smart_resize, resize, patchify, normalize
  video.py     a clip -> frames chosen by time
  geometry.py  a grid -> window order, rotary and M-RoPE ids; `Pixels`, for the device
  ops.py       crop_image_normalized, select_frames: (seen, arguments) -> pictures
  resample.py  the zoom on a device, equal to PIL; only rollout/engine.py imports it

Everything is pixel-exact to `transformers`' Qwen2VLImageProcessorPil.  Nothing here but
resample.py imports jax, nothing torch; importing this package imports none of its files.
"""
