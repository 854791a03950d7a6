"""Embed the words that may name a latent."""

from dncbm.cli import main

if __name__ == "__main__":
    main("vocabulary")
