"""A path and an index in, a uint8 clip out: lists, decoding, sampling, transforms, loading."""
