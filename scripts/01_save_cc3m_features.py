"""Extract the features of the images that the SAE is trained on."""

from dncbm.cli import main

if __name__ == "__main__":
    main("sae_features")
