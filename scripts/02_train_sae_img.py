"""Train the sparse autoencoder."""

from dncbm.cli import main

if __name__ == "__main__":
    main("sae")
