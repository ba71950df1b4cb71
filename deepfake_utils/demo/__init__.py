"""A synthetic corpus in the layout of a real one, so that everything can be tried without a download."""

from deepfake_utils.demo.corpus import DEMO_NOTICE, build_demo

__all__ = ["DEMO_NOTICE", "build_demo"]
