"""Stage 0: fetch Conceptual Captions from its two TSVs, as webdataset shards."""

from dncbm.cli import main

if __name__ == "__main__":
    main("download")
