"""Import what the paper's authors publish or their code writes: SAEs, names, embeddings, features, probes."""

from dncbm.cli import main

if __name__ == "__main__":
    main("import_published")
