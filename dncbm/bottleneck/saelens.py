"""An SAE as a folder that SAELens loads (https://github.com/decoderesearch/SAELens, version 6)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dncbm.runs.errors import UserError
from sparse_autoencoder import BatchTopK, JumpReLU, ReLU, SparseAutoencoder, TopK
from sparse_autoencoder.files import whole_file, write_safetensors
from sparse_autoencoder.variants import sparsity_to_json

FORMAT_VERSION = "6.0.0"
"""The release that introduced this format of cfg.json. SAELens reads one without a version as an older format."""


CONFIG, WEIGHTS = FILES = ("cfg.json", "sae_weights.safetensors")


def save_saelens(
    sae: SparseAutoencoder, folder: Path, *, model_name: str, hook_name: str, dataset: str, provenance: Mapping[str, Any]
) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk(folder)` reads.

    The loaded SAE has the latents and reconstructions of `sae`, in the same order and scale. SAELens computes
    z = act((r x - b_dec) W_enc + b_enc) and x_hat = (z W_dec + b_dec) / r, where r is 1, or sqrt(D) / |x| under its
    "constant_norm_rescale". So b_dec includes the centre of "centre", and W_enc, W_dec and b_dec absorb the sqrt(D) of
    "unit_norm". BatchTopK has a fixed threshold outside training, which makes it a JumpReLU; a Matryoshka SAE is its code.

    One input differs: under "unit_norm", SAELens makes NaN of an all-zero input, because it divides by the norm.

    Args:
        sae: the SAE, on any device. The weights are written as float32, for the CPU.
        folder: made if it is missing; an export in it is replaced.
        model_name, hook_name, dataset: the encoder, its hook point and the SAE's data set, in SAELens's metadata.
        provenance: whatever else to record, as JSON, under `metadata.dncbm`.

    Raises:
        UserError: SAELens has no architecture for the SAE's sparsity variant; nothing is written.
    """
    architecture, thresholds = _architecture(sae)
    scale = sae.n_inputs**0.5 if sae.input_transform == "unit_norm" else 1.0
    shift = sae.input_centre if sae.input_transform == "centre" else 0.0
    tensors = {
        "W_enc": sae.encoder_weight.t() / scale,
        "b_enc": sae.encoder_bias,
        "W_dec": sae.decoder_weight * scale,
        "b_dec": (sae.tied_bias + shift) * scale,
        **thresholds,
    }
    config = {
        **architecture,
        "d_in": sae.n_inputs,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "constant_norm_rescale" if sae.input_transform == "unit_norm" else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": model_name,
            "hook_name": hook_name,
            "dataset_path": dataset,
            "neuronpedia_id": None,
            "dncbm": {
                **provenance,
                "sparsity": json.loads(sparsity_to_json(sae.sparsity)),
                "input_transform": sae.input_transform,
            },
        },
    }
    # The weights are written inside the block, so that an error there leaves an older export as it was. SAELens opens cfg.json
    # in the encoding of the locale, hence plain ASCII.
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="ascii")
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        write_safetensors(weights, folder / WEIGHTS, {"format": "pt"})


def _architecture(sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens's settings and tensors for the code of an SAE as it is outside training."""
    code = sae.sparsity.code
    # Exact types, because a subclass may activate otherwise.
    if type(code) is ReLU:
        return {"architecture": "standard"}, {}
    if type(code) is TopK:
        k = min(code.k, sae.n_latents)  # SAELens fails if k is above the number of latents
        return {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}, {}
    if type(code) in (BatchTopK, JumpReLU):
        threshold = code.threshold(sae)
        assert threshold is not None
        return {"architecture": "jumprelu"}, {"threshold": threshold.expand(sae.n_latents)}
    raise UserError(
        f"SAELens has no architecture for the sparsity variant {code.kind!r}: export an SAE of --sae_type relu, topk,"
        " batchtopk, jumprelu or matryoshka"
    )
