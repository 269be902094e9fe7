"""The two jobs of a configuration: train and test, each inside a `session`."""

from octvideo.jobs.session import session
from octvideo.jobs.testing import load_trained, test, weights_to_test
from octvideo.jobs.training import train

__all__ = ["load_trained", "session", "test", "train", "weights_to_test"]
