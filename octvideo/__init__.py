"""Octave convolution networks for video action recognition. Importing this imports nothing heavy."""

__version__ = "0.1.0"
