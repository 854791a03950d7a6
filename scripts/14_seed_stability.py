"""Compare SAEs that differ only in their seed: which latents, and which names, do they share?"""

from dncbm.cli import main

if __name__ == "__main__":
    main("seed_stability")
