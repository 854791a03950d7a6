"""Stage 4: name each latent of the sparse autoencoder by its nearest word."""

from dncbm.cli import main

if __name__ == "__main__":
    main("names")
