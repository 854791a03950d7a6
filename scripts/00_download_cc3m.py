"""Download Conceptual Captions from its two TSV files, as webdataset shards."""

from dncbm.cli import main

if __name__ == "__main__":
    main("download")
