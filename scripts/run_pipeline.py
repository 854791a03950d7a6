"""All stages in order. What is done is not done again; what an interruption left goes on."""

from dncbm.cli import main

if __name__ == "__main__":
    main("pipeline")
