"""Discover-then-Name concept bottlenecks: from any CLIP-like image encoder to an interpretable classifier.

The stages, in order: `features` (images to features), `sae` (features to a sparse autoencoder), `vocabulary` and `naming`
(latents to words), `concepts` (features to concept strengths), `probing` (concept strengths to predictions). Each stage is
one function that reads artifacts and writes artifacts; `scripts/` are their command lines.
"""

__version__ = "1.0.0"
