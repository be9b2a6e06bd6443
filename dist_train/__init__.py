"""dist_train: a dataset into WebDataset shards once, then image classifiers on any number of processes."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # torch is imported when the stream is asked for, not when the package is
    if name == "open_stream":
        from dist_train.data import open_stream

        return open_stream
    raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
