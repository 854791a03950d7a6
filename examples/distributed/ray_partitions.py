"""Divide stage 1, 5 or 6 into N parts and let a Ray cluster make them, for example with N = 8:

python examples/distributed/ray_partitions.py 8 scripts/01_save_cc3m_features.py --img_enc_name clip_RN50
"""

import os
import subprocess
import sys

import ray

if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
    sys.exit(__doc__)
n, command, folder = int(sys.argv[1]), [sys.executable, *sys.argv[2:]], os.getcwd()  # the same on all nodes
config = {name: value for name, value in os.environ.items() if name == "DNCBM_CONFIG"}
ray.init()  # the cluster of RAY_ADDRESS, or one that `ray start` started on this machine, or else this machine alone


# A part takes one core, and one GPU if the cluster has any; num_cpus=8 or num_gpus=0.5 asks for more or less. Ray repeats a
# part that fails, or whose worker or node is lost, up to three times. The shards that it had finished are kept.
@ray.remote(num_gpus=1 if "GPU" in ray.cluster_resources() else 0, max_retries=3, retry_exceptions=True)
def make(part: str) -> None:
    """Run the script on a part, in a process of its own."""
    subprocess.run([*command, "--partition", part], cwd=folder, env=os.environ | config, check=True)


ray.wait([make.remote(f"{i + 1}/{n}") for i in range(n)], num_returns=n)
ray.shutdown()
sys.exit(subprocess.call([*command, "--partition", "merge"]))  # which says what is missing
