"""Speech in the open: a corpus of public recordings that anybody can build again from a list the package carries."""

from deepfake_utils.collecting.collect import collect
from deepfake_utils.collecting.sources import read_sources
from deepfake_utils.collecting.synthesise import ENGINES, synthesise

__all__ = ["ENGINES", "collect", "read_sources", "synthesise"]
