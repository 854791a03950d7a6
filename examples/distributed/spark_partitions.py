"""Divide stage 1, 5 or 6 into N parts and let a Spark cluster make them, for example with N = 8:

python examples/distributed/spark_partitions.py 8 scripts/01_save_cc3m_features.py --img_enc_name clip_RN50
"""

import os
import subprocess
import sys
from contextlib import suppress

from py4j.protocol import Py4JJavaError
from pyspark import SparkContext, TaskContext

if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
    sys.exit(__doc__)
n, command, folder = int(sys.argv[1]), [sys.executable, *sys.argv[2:]], os.getcwd()  # the same on all nodes
config = {name: value for name, value in os.environ.items() if name == "DNCBM_CONFIG"}
# Unless spark-submit says otherwise: N parts at a time on this machine, each tried up to four times, as on a cluster.
os.environ.setdefault("PYSPARK_SUBMIT_ARGS", f"--master local[{n},4] pyspark-shell")
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)


# `--conf spark.task.resource.gpu.amount=1` gives each part a GPU. Spark repeats a part that fails, or whose worker or node is
# lost. The shards that it had finished are kept.
def make(part: int) -> None:
    """Run the script on a part, in a process of its own."""
    gpu = TaskContext.get().resources().get("gpu")
    own = config | ({"CUDA_VISIBLE_DEVICES": ",".join(gpu.addresses)} if gpu else {})
    subprocess.run([*command, "--partition", f"{part + 1}/{n}"], cwd=folder, env=os.environ | own, check=True)


with SparkContext(appName="dncbm") as spark, suppress(Py4JJavaError):
    spark.setLogLevel("OFF")  # instead of Java's stack traces, the script's own messages show
    spark.parallelize(range(n), n).foreach(make)
sys.exit(subprocess.call([*command, "--partition", "merge"]))  # which says what is missing
