"""This package's training step beside those of other SAE libraries, as a table in Markdown.

    python benchmarks/sae_peers.py [--venv FOLDER] [--rounds 5]

Makes a virtual environment in FOLDER (and keeps it) with sae-lens, dictionary-learning, eai-sparsify and overcomplete from
PyPI; torch comes from the environment that runs this. Each library makes its own step (forward, backward, its optimiser, its
norm constraint) on the same batch, in turn: D = 1024, F = 8192, B = 4096, and 32 active latents if the library has such a
setting. Times are medians, in seconds and in units of the encoder's product alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

PACKAGES = ["sae-lens", "dictionary-learning", "eai-sparsify", "overcomplete", "matplotlib<3.9"]
D, F, B, K = 1024, 8192, 4096, 32


def make_venv(folder: Path) -> Path:
    """The interpreter of a virtual environment that adds the peers to this environment's packages."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        find = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip())
        here = [sysconfig.get_path("purelib"), str(Path(__file__).resolve().parent.parent / "sparse_autoencoder")]
        (site / "below.pth").write_text("\n".join(here) + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return python


def ways(device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Each library's step on one batch on a device, and the product alone."""
    import torch
    from dictionary_learning.trainers.standard import StandardTrainer
    from overcomplete.sae import SAE as OvercompleteSAE
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_step import calibrated
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    from sparse_autoencoder import ReLU, TopK
    from sparse_autoencoder.optimizer import Adam
    from sparse_autoencoder.stepper import Stepper

    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    relu, topk = (model.to(device) for model in (calibrated(D, K, ReLU(), x), calibrated(D, F / 2, TopK(K), x)))
    relu_step, topk_step = (Stepper(model, Adam(model, lr=1e-6), batch_size=B) for model in (relu, topk))
    for stepper in (relu_step, topk_step):
        stepper.density = K / F  # sparse from the first step
    x = x.to(device)
    weight, out = relu.encoder_weight.detach(), torch.empty(B, F, device=device)

    lens = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, device=device))
    lens_adam = torch.optim.Adam(lens.parameters(), lr=1e-6)

    def sae_lens() -> None:
        output = lens.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, None, 0, False))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(lens.parameters(), 1.0)
        lens_adam.step()
        lens_adam.zero_grad()

    dictionary = StandardTrainer(steps=10**6, activation_dim=D, dict_size=F, layer=0, lm_name="", device=device)

    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), device=device)
    coder_adam = torch.optim.Adam(coder.parameters(), lr=1e-6)

    def sparsify() -> None:
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        coder_adam.step()
        coder_adam.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    complete = OvercompleteSAE(D, F, device=device)
    complete_adam = torch.optim.Adam(complete.parameters(), lr=1e-6)

    def overcomplete() -> None:
        complete_adam.zero_grad()
        _, codes, reconstruction = complete(x)
        ((x - reconstruction).square().mean() + 1e-3 * codes.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(complete.parameters(), 1.0)
        complete_adam.step()

    return {
        "encoder product alone": lambda: torch.mm(x, weight.t(), out=out),
        "sparse_autoencoder, ReLU": lambda: relu_step(x),
        "sparse_autoencoder, TopK": lambda: topk_step(x),
        "sae-lens, standard": sae_lens,
        "dictionary-learning, standard": lambda: dictionary.update(1, x),
        "eai-sparsify, TopK": sparsify,
        "overcomplete, SAE": overcomplete,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "sae_peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        command = [str(make_venv(options.venv)), __file__, "--inside", "--rounds", str(options.rounds)]
        # sparsify uses its plain torch decoder, the one for CPUs, only if told to.
        raise SystemExit(subprocess.run(command, env={**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}).returncode)

    from sae_step import interleaved

    times = interleaved(ways(), options.rounds)
    product = times["encoder product alone"]
    versions = json.dumps({name: _version(name) for name in ("torch", *(p.split("<")[0] for p in PACKAGES[:4]))})
    print(f"{versions}\n\n| step | seconds | in units of the product |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, product, strict=True))
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} |")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
