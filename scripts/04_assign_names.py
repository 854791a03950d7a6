"""Name each latent of the sparse autoencoder after its nearest word, and test the names."""

from dncbm.cli import main

if __name__ == "__main__":
    main("names")
