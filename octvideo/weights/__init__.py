"""Other people's weights: what a file holds, under our names, and ours under theirs."""

from octvideo.weights.coverage import Coverage, WeightsError
from octvideo.weights.files import Source, read

__all__ = ["Coverage", "Source", "WeightsError", "read"]
