"""What a run is and where it lies: the config, declarations of every setting, paths, manifests, the results file.

Every room may import this one. It imports no other room, only `sparse_autoencoder`.
"""
