"""Waveforms on their way to the model: files, cache, packed store or device memory, then batches.

The names below are imported on first use, so that recordings can be decoded without loading torch.
"""

from importlib import import_module

_HOME = {
    "Batch": "batches",
    "balanced_weights": "batches",
    "eval_batches": "batches",
    "train_batches": "batches",
    "CachedSource": "cache",
    "ClipCache": "cache",
    "FileSource": "cache",
    "shared_cache": "cache",
    "Source": "sources",
    "open_source": "sources",
    "DeviceSource": "store",
    "PackedStore": "store",
    "StoreError": "store",
    "open_store": "store",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"deepfake_utils.waveforms has no {name!r}: its names are {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
