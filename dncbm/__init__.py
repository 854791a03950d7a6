"""Discover-then-Name concept bottlenecks: from any CLIP-like image encoder to an interpretable classifier.

The stages, in order: `features` (images to features), `sae` (features to a sparse autoencoder), `vocabulary` and `naming`
(latents to words), `concepts` (features to concept strengths), `probing` (concept strengths to predictions). Each stage is
one function that reads artifacts and writes artifacts; `scripts/` are their command lines.
"""

import os

# Read when torch is imported. OpenMP threads that wait for work would otherwise spin on cores that other processes need,
# our own that decode images among them: many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "1.0.0"
