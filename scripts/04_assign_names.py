"""Name each latent of the sparse autoencoder after its nearest word."""

from dncbm.cli import main

if __name__ == "__main__":
    main("names")
